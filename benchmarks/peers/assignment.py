"""What a process of a peer is told when it starts, as JSON in its one argument."""

from __future__ import annotations

import sys

import msgspec


class Assignment(msgspec.Struct, kw_only=True, frozen=True):
    """Who a process is, and what it trains.

    Attributes:
        role: ``chief``, ``worker`` or ``ps``, as the peer means it.
        index: Of the task among those of its role.
        tasks: All tasks of the peer, such as ``worker:0``, in an order that all of them agree on.
        workers: How many tasks compute gradients.
        model: Its name; see `benchmarks.models.shapes`.
        threads: For each task's computations.
        folder: Empty and this measurement's own; all processes of the peer share it.
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
        """Its own name among ``tasks``."""
        return f"{self.role}:{self.index}"


def read_assignment() -> Assignment:
    """This process's own."""
    return msgspec.json.decode(sys.argv[1], type=Assignment)
