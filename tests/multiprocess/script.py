"""``python -m tests.multiprocess.script SCRIPT ARGUMENTS...`` is ``python SCRIPT ARGUMENTS...``, for what is forked."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
