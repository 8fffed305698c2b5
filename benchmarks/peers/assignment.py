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
        model: The name of the model in `benchmarks.models.MODELS`; its properties follow.
        sizes: Features of the input, of each hidden layer, and of the output, which are the classes.
        batch: Examples in a batch.
        batches: How many batches there are, taken over and over.
        learning_rate: Of plain SGD.
        threads: For each task's computations.
        folder: Empty and this measurement's own; all processes of the peer share it.
    """

    role: str
    index: int
    tasks: tuple[str, ...]
    workers: int
    model: str
    sizes: tuple[int, ...]
    batch: int
    batches: int
    learning_rate: float
    threads: int
    folder: str

    @property
    def task(self) -> str:
        """Its own name among ``tasks``."""
        return f"{self.role}:{self.index}"


def read_assignment() -> Assignment:
    """This process's own."""
    return msgspec.json.decode(sys.argv[1], type=Assignment)
