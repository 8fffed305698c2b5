"""Participants of a measurement, seen from the process that measures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from benchmarks.harness.crew import Child
from benchmarks.harness.figure import Side
from benchmarks.harness.options import Options
from benchmarks.harness.participant import Measured, Ready, Window

START_LIMIT = 120.0
LATE_LIMIT = 60.0


def await_ready(children: Sequence[Child]) -> list[Ready]:
    """Wait until all participants are warm.

    Raises:
        BenchmarkError: If one of them ends or takes too long.
    """
    return [child.receive(Ready, START_LIMIT) for child in children]


def slowest_step(children: Sequence[Child]) -> float:
    """Wait until all participants are warm, and return the seconds of the slowest one's step."""
    return max(ready.step_seconds for ready in await_ready(children))


def run_window(children: Sequence[Child], seconds: float, step_seconds: float) -> list[Measured]:
    """Have all participants measure the same ``seconds``. Blocks.

    Args:
        children: The participants.
        seconds: Length of the window.
        step_seconds: Approximate duration of a step, which decides how long they train before and after.

    Raises:
        BenchmarkError: If one of them ends or takes too long.
    """
    begin = time.monotonic() + max(0.2, 2 * step_seconds)
    end = begin + seconds
    window = Window(begin=begin, end=end, stop=end + max(0.05, 2 * step_seconds))
    for child in children:
        child.order(window)
    limit = window.stop - time.monotonic() + LATE_LIMIT
    return [child.receive(Measured, limit) for child in children]


def rate(window: Iterable[Measured]) -> float:
    """Return the steps per second of all participants together."""
    return sum(part.steps / part.seconds for part in window)


def steps_per_second(children: Sequence[Child], seconds: float, step_seconds: float) -> float:
    """Have participants work at the same time for ``seconds``, and return the steps of all of them in a second."""
    return rate(run_window(children, seconds, step_seconds))


def sides(options: Options, step_seconds: float, *groups: Sequence[Child]) -> Iterator[Side]:
    """Yield for each group of participants a side of a figure, whose results are the group's steps per second."""
    return (partial(steps_per_second, group, options.seconds, step_seconds) for group in groups)


def seconds_per_step(children: Sequence[Child], seconds: float, step_seconds: float) -> float:
    """Return the inverse of `steps_per_second`."""
    return 1 / steps_per_second(children, seconds, step_seconds)
