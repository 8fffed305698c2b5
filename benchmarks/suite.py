"""``python -m benchmarks.suite``: all benchmarks whose results are a `Figure`, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import growth, lanes, latency, null, startup, training
from benchmarks.figure import Effort, Figure, run

BENCHMARKS = (null, lanes, training, growth, latency, startup)


def measure(effort: Effort) -> Iterator[Figure]:
    """The figures of all of them. Blocks for about twelve minutes."""
    for benchmark in BENCHMARKS:
        yield from benchmark.measure(effort)


if __name__ == "__main__":
    run(measure, "Every figure beside something plain in the same session.")
