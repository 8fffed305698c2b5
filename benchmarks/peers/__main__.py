"""``python -m benchmarks.peers``: short for ``python -m benchmarks peers``."""

import sys

from benchmarks.harness.command import app

if __name__ == "__main__":
    app()(["peers", *sys.argv[1:]])
