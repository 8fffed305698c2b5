"""The two ends of a way between a worker and a ps. Whatever moves the bytes, both sides see only this.

A worker holds a `Lane` to each ps, a ps a `Session` for each worker. The two halves are different classes, since
they run on different machines; ``testing.conformance`` checks every pair with one kit.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from paramserver.arena import ArenaLayout, HasFileno, StoreMemory
from paramserver.wire.messages import Reply, Request


class Piece(NamedTuple):
    """Elements ``[start, stop)`` of one arena, inside one block."""

    arena: int
    start: int
    stop: int


@dataclass(frozen=True)
class WorkerMemory:
    """What the module and autograd of a worker use, for the arenas of one ps.

    Attributes:
        values: A flat tensor for each arena; parameters are views into it.
        gradients: A flat tensor for each arena; what lies here is what a push sends.
        direct: Whether ``values`` is the store's own memory, so that nothing has to be pulled.
        file: What ``gradients`` lie in, if processes of this host can map it; open for as long as this object lives.
    """

    values: list[torch.Tensor]
    gradients: list[torch.Tensor]
    direct: bool = False
    file: HasFileno | None = None


ReadPiece = Callable[[Piece, torch.Tensor], None]


class Lane(abc.ABC):
    """The worker's end. One request at a time: `start`, then `finish`. Not thread-safe.

    Attributes:
        name: The word for it in messages: ``shared memory``, ``tcp``, ``in process``.
        task: The ps at the other end.
    """

    name: str
    task: str

    @abc.abstractmethod
    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
        """Make the memory for the arenas that were declared. Blocks for a round trip; once per lane.

        Args:
            layouts: What was declared.
            kept: The memory of an earlier lane to the same ps, whose connection was lost, to go on with.

        Raises:
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def start(self, request: Request, outgoing: Sequence[Piece] = ()) -> None:
        """Send a request with these pieces of the gradient memory as its payload. Blocks until it is handed over.

        The gradient memory belongs to the lane until `finish` returns.

        Raises:
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def finish(self, incoming: Sequence[Piece] = ()) -> Reply:
        """Wait for the reply and bring these pieces of the value memory up to date, unless it is a refusal.

        Values are whole block by block: what is read of one block is of one version.

        Raises:
            UnavailableError: If the connection is lost, or nothing comes for the lane's time limit.
            RemoteProtocolError: If the peer sends what does not belong here.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection. Idempotent; the peer sees the end of the stream."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self.task} by {self.name}>"


class Session(abc.ABC):
    """The ps's end of a lane to one worker. Used by one thread.

    Attributes:
        task: The worker at the other end.
        incarnation: Which start of that task it is.
    """

    task: str
    incarnation: str

    @abc.abstractmethod
    def receive(self) -> Request | None:
        """Wait for the next request; None when the worker has closed the connection.

        Raises:
            UnavailableError: If the connection is lost.
            RemoteProtocolError: If the peer sends what is no request.
        """

    @abc.abstractmethod
    def open(self, layouts: Sequence[ArenaLayout], memory: StoreMemory) -> None:
        """Tell the session which arenas there are; called before the first piece is asked for."""

    @abc.abstractmethod
    def gradient(self, piece: Piece) -> torch.Tensor:
        """The next piece of the current request's payload, flat; pieces are asked for in the order they were sent.

        The tensor is valid until the next call. Blocks while the payload arrives.

        Raises:
            UnavailableError: If the connection is lost.
            RemoteProtocolError: If the payload holds less than is asked for.
        """

    @abc.abstractmethod
    def reply(self, reply: Reply, pieces: Sequence[Piece] = (), read: ReadPiece | None = None) -> None:
        """Answer the current request; what is left of its payload is dropped.

        Args:
            reply: The message.
            pieces: What the payload holds.
            read: Copies a piece, whole, into a tensor of its size; not called where the worker reads for itself.

        Raises:
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection. Idempotent, and safe from another thread: wakes a blocked `receive`."""
