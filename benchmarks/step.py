"""``python -m benchmarks.step``: short for ``python -m benchmarks step``."""

import sys

from benchmarks.harness.command import app

if __name__ == "__main__":
    app()(["step", *sys.argv[1:]])
