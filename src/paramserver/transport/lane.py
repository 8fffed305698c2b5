"""The two ends of a way between a worker and a ps. Whatever moves the bytes, both sides see only this.

A worker holds a `Lane` to each ps, a ps a `Session` for each worker. The two halves are different classes, since
they run on different machines; ``testing.lane_kit`` checks every pair with one kit.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.memory.arena_memory import HasFileno, StoreMemory, tensor_bytes
from paramserver.transport.frames import FrameSocket
from paramserver.wire.messages import Reply, Request


class Piece(NamedTuple):
    """Elements ``[start, stop)`` of one arena, inside one block."""

    arena: int
    start: int
    stop: int


def whole_blocks(layouts: Sequence[ArenaLayout]) -> list[Piece]:
    """Each block of the arenas that a worker has memory for, which is what most steps move."""
    return [Piece(arena, *span) for arena, layout in enumerate(layouts) for span in layout.on_worker.pieces]


class TableRows(NamedTuple):
    """Rows of a table: ``ids [rows]``, ascending, none twice, and ``values [rows, width]``, contiguous on the CPU."""

    ids: npt.NDArray[np.int64]
    values: torch.Tensor

    @property
    def id_bytes(self) -> memoryview:
        """What travels of the ids."""
        return np.ascontiguousarray(self.ids).view(np.uint8).data

    @property
    def value_bytes(self) -> memoryview:
        """The memory of the values."""
        return tensor_bytes(self.values)


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


LockPiece = Callable[[Piece], AbstractContextManager[object]]
"""Keeps everyone from writing to a piece of the store's memory. Nobody may wait for a peer meanwhile."""


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
    def renew(self) -> WorkerMemory:
        """Go on with new, zeroed memory for gradients; whatever holds the present one keeps it as it is.

        Called after `open`, between requests. Blocks for a round trip.

        Raises:
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def start(self, request: Request, outgoing: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> None:
        """Send a request with a payload. Blocks until it is handed over.

        Args:
            request: The message.
            outgoing: Pieces of the gradient memory, which belongs to the lane until `finish` returns.
            rows: Of tables: their ids and values, from wherever they lie. They come first.

        Raises:
            LocalProtocolError: If there are more rows than the declared tables have.
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def finish(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Reply:
        """Wait for the reply and take what belongs to it, unless it is a refusal.

        Args:
            incoming: Pieces of the value memory, to be brought up to date. They are whole block by block: what is
                read of one block is of one version.
            rows: Where the rows of tables go that were asked for; they come first, and each is of one version.

        Raises:
            UnavailableError: If the connection is lost, or nothing comes for the lane's time limit.
            RemoteProtocolError: If the peer sends what does not belong here.
        """

    def copy_rows(self, arena: int, rows: TableRows) -> bool:
        """Copy rows of a table without asking the ps; whether it did.

        It does not where this end does not see the memory of the ps, or others keep writing to these rows.

        Args:
            arena: The table.
            rows: Their ids, in its range, in any order and as often as they are wanted, and where they go; each row
                that is copied is of one version.

        Raises:
            UnavailableError: If the ps is lost.
        """
        return False

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
    def take_rows(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """The next bytes of what the current request's payload holds of tables. Blocks while they arrive.

        The array is valid until the reply, and for reading only. It may lie in memory that the worker can write to:
        what is checked, such as ids, has to be copied first.

        Raises:
            UnavailableError: If the connection is lost.
            RemoteProtocolError: If the payload holds less than is asked for.
        """

    @abc.abstractmethod
    def reply(
        self,
        reply: Reply,
        pieces: Sequence[Piece] = (),
        lock: LockPiece | None = None,
        rows: Sequence[memoryview] = (),
    ) -> None:
        """Answer the current request; what is left of its payload is dropped.

        Args:
            reply: The message.
            pieces: What the payload holds.
            lock: Held while a piece is read from the store's memory; not called where the worker reads for itself.
            rows: The rows that were asked for.

        Raises:
            UnavailableError: If the connection is lost.
        """

    def is_of_program(self, error: Exception) -> bool:
        """Whether code of the program that makes the requests has raised an error while one was carried out."""
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection. Idempotent, and safe from another thread: wakes a blocked `receive`."""


@dataclass(frozen=True)
class LaneKind:
    """A kind of lane, as its row of `layout.lanes` names it.

    Attributes:
        lane: Makes the worker's end over a connection whose handshake is done.
        session: Makes the ps's end, from such a connection and the incarnation of the worker.
        is_local: Whether it goes over the Unix socket of the ps, which only tasks on its host reach.
        keeps: Whether a lane of this kind can go on with the memory of an earlier lane of any kind; see `Lane.open`.
        obstacle: Says why this machine cannot use it; empty if it can.
    """

    lane: Callable[[FrameSocket], Lane]
    session: Callable[[FrameSocket, str], Session]
    is_local: bool = False
    keeps: Callable[[WorkerMemory], bool] = lambda memory: True
    obstacle: Callable[[], str] = lambda: ""
