"""``python -m benchmarks``: the command line of all benchmarks."""

from benchmarks.harness.command import app

if __name__ == "__main__":
    app()()
