"""The orders of a process of a peer, as JSON in its one argument."""

from __future__ import annotations

import sys

import msgspec


class Assignment(msgspec.Struct, kw_only=True, frozen=True):
    """The identity of a process, and what it trains.

    Attributes:
        role: ``chief``, ``worker`` or ``ps``, as the peer means it.
        index: Index of the task among those of its role.
        tasks: All tasks of the peer, such as ``worker:0``, in an order that all of them agree on.
        workers: Number of tasks that compute gradients.
        model: Name of the model; see `benchmarks.models.shapes`.
        threads: Threads of each task's computations.
        folder: An empty folder of this measurement, which all processes of the peer share.
    """

    role: str
    index: int
    tasks: tuple[str, ...]
    workers: int
    model: str
    threads: int
    folder: str

    @property
    def task(self) -> str:
        """Its name among ``tasks``."""
        return f"{self.role}:{self.index}"


def read_assignment() -> Assignment:
    """Return the assignment of this process."""
    return msgspec.json.decode(sys.argv[1], type=Assignment)
