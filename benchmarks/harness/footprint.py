"""The memory of tasks in training, beyond that of idle ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from benchmarks.harness import memory
from benchmarks.harness.crew import Child
from benchmarks.harness.memory import Memory


class Holding(msgspec.Struct, kw_only=True, frozen=True):
    """The memory of a task beyond that of an idle one of its kind, in copies of the values that it has to hold.

    For a worker a copy is the model's parameters, and the fullest worker counts; for the ps tasks together it is
    values and slots.

    Attributes:
        steady: Copies between two steps.
        peak: Largest number of copies at any moment of the training.
        start_peak: Largest number of copies until the first steps were done.
        copy_bytes: Bytes of a copy.
        steady_bytes: ``steady`` in bytes.
    """

    steady: float
    peak: float
    start_peak: float
    copy_bytes: int
    steady_bytes: int


class Usage(NamedTuple):
    """Bytes of a task, as in `Holding`."""

    steady: int
    peak: int
    start_peak: int


class Footprint:
    """The memory of some tasks, looked at while they wait between two steps.

    Args:
        children: The tasks, which have taken their first steps.
    """

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children
        self._seen = [self._read()]
        for child in children:
            memory.reset_peak(child.pid)

    def look(self) -> None:
        """Take note of the present memory."""
        self._seen.append(self._read())

    def usages(self) -> list[Usage]:
        """Return the usage of each task; an empty list where the system does not tell."""
        return [
            Usage(int(statistics.median(one.now for one in seen)), max(one.peak for one in seen), start.peak)
            for start, *seen in zip(*self._seen, strict=True)
        ]

    def _read(self) -> list[Memory]:
        found = [memory.read(child.pid) for child in self._children]
        return [one for one in found if one is not None]


def beyond(
    full: Footprint, idle: Footprint, copy_bytes: int, together: Callable[[Iterable[Usage]], Usage]
) -> Holding | None:
    """Compare tasks with as many idle ones.

    Args:
        full: The footprint of tasks in training.
        idle: That of idle tasks.
        copy_bytes: Bytes of a copy.
        together: Makes the usages of all tasks one: `max`, or `total`.

    Returns:
        None where the system does not tell.
    """
    pairs = list(zip(full.usages(), idle.usages(), strict=False))
    if not pairs:
        return None
    steady, peak, start_peak = together(
        Usage(*(one - other for one, other in zip(task, idle_task, strict=True))) for task, idle_task in pairs
    )
    return Holding(
        steady=steady / copy_bytes,
        peak=peak / copy_bytes,
        start_peak=start_peak / copy_bytes,
        copy_bytes=copy_bytes,
        steady_bytes=steady,
    )


def total(usages: Iterable[Usage]) -> Usage:
    """Return the sum of usages."""
    return Usage(*map(sum, zip(*usages, strict=True)))
