"""Benchmarks of paramserver: ``python -m benchmarks --help`` lists them.

* `benchmarks.cases`: one file for each case that is measured.
* `benchmarks.models`: the models that are trained.
* `benchmarks.harness`: starts processes, measures them in turns, and shows figures.
* `benchmarks.peers`: other ways to train, measured beside this one.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the repository."""
