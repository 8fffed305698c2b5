"""The two ends of a connection between a worker and a ps; both sides see only this, not how the bytes move.

A worker holds a `Lane` to each ps, a ps a `Session` for each worker. The two ends are different classes, because they
run on different machines; ``testing.lane_kit`` checks every pair with one kit.
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
from paramserver.transport.together import Steps
from paramserver.wire.messages import Reply, Request


class Piece(NamedTuple):
    """Elements ``[start, stop)`` of one arena, inside one block."""

    arena: int
    start: int
    stop: int


def whole_blocks(layouts: Sequence[ArenaLayout]) -> list[Piece]:
    """Return each block of the arenas that a worker has memory for; most steps move just these."""
    return [Piece(arena, *span) for arena, layout in enumerate(layouts) for span in layout.on_worker.pieces]


class TableRows(NamedTuple):
    """Rows of a table: ``ids [rows]``, ascending and unique, and ``values [rows, width]``, contiguous on the CPU."""

    ids: npt.NDArray[np.int64]
    values: torch.Tensor

    @property
    def id_bytes(self) -> memoryview:
        """Bytes of the ids, as they are sent."""
        return np.ascontiguousarray(self.ids).view(np.uint8).data

    @property
    def value_bytes(self) -> memoryview:
        """Memory of the values."""
        return tensor_bytes(self.values)


@dataclass(frozen=True)
class WorkerMemory:
    """Memory for the arenas of one ps, as the module and autograd of a worker use it.

    Attributes:
        values: A flat tensor for each arena; parameters are views into it.
        gradients: A flat tensor for each arena; a push sends its content.
        direct: Whether ``values`` is the store's own memory, so that nothing has to be pulled.
        file: The file of ``gradients``, if processes on this host can map it; open for as long as this object lives.
    """

    values: list[torch.Tensor]
    gradients: list[torch.Tensor]
    direct: bool = False
    file: HasFileno | None = None


LockPiece = Callable[[Piece], AbstractContextManager[object]]
"""Keeps every task from writing to a piece of the store's memory. Its holder must not wait for a peer."""


SendValues = Callable[[int], None]
"""Sends pieces up to the first so many; each is read under its lock. Raises UnavailableError."""


class Lane(abc.ABC):
    """The worker's end. One request at a time: `start`, then `finish`. Not thread-safe.

    Attributes:
        name: The kind of lane in messages: ``shared memory``, ``tcp``, ``in process``.
        task: The ps at the other end.
    """

    name: str
    task: str

    @abc.abstractmethod
    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
        """Make the memory for the declared arenas. Blocks for a round trip; called once per lane.

        Args:
            layouts: The declared layouts.
            kept: The memory of an earlier lane to the same ps, whose connection was lost, to go on with.

        Raises:
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def renew(self) -> WorkerMemory:
        """Go on with new, zeroed gradient memory; other references to the present memory keep it unchanged.

        Called after `open`, between requests. Blocks for a round trip.

        Raises:
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def start(self, request: Request, outgoing: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> None:
        """Send a request with a payload. Does not wait for the ps to take it: `finish` sends what it does not take.

        Args:
            request: The message.
            outgoing: Pieces of the gradient memory, which belongs to the lane until `finish` returns.
            rows: Ids and values of table rows, in any memory that stays unchanged until then. They are sent first.

        Raises:
            LocalProtocolError: If there are more rows than the declared tables have.
            UnavailableError: If the connection is lost.
        """

    @abc.abstractmethod
    def finish(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Reply:
        """Wait for the reply and receive its payload, unless the reply is a refusal.

        Args:
            incoming: Pieces of the value memory to bring up to date. Each block is whole: all that is read from it is
                of one version.
            rows: Memory for the requested table rows, which come first; each row is of one version.

        Raises:
            UnavailableError: If the connection is lost, or nothing comes within the lane's time limit.
            RemoteProtocolError: If the peer sends something unexpected.
        """

    def finishing(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Steps | None:
        """Return the steps of `finish`, for large exchanges with several ps tasks at once; None if there are none."""
        return None

    def copy_rows(self, arena: int, rows: TableRows) -> bool:
        """Copy rows of a table without a request to the ps, and return whether they were copied.

        They are not copied if this end does not see the memory of the ps, or if other workers keep writing to them.

        Args:
            arena: The table.
            rows: Ids of the rows, in any order and possibly repeated, and memory for their values; each copied row is
                of one version.

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
        incarnation: The incarnation of the worker.
        is_at_hand: Whether a gradient is there as soon as its request is: `gradient` may then be called for the pieces
            in any order and by any thread, and each is valid until the reply.
    """

    task: str
    incarnation: str
    is_at_hand = False

    @abc.abstractmethod
    def receive(self) -> Request | None:
        """Wait for the next request; None when the worker has closed the connection.

        Raises:
            UnavailableError: If the connection is lost.
            RemoteProtocolError: If the peer sends something that is not a request.
        """

    @abc.abstractmethod
    def open(self, layouts: Sequence[ArenaLayout], memory: StoreMemory) -> None:
        """Tell the session the arenas, before the first piece is asked for."""

    @abc.abstractmethod
    def gradient(self, piece: Piece) -> torch.Tensor:
        """Return the next piece of the current request's payload, flat; ask for pieces in the order they were sent.

        The tensor is valid until the next call. Blocks while the payload arrives.

        Raises:
            UnavailableError: If the connection is lost.
            RemoteProtocolError: If the payload has fewer bytes left.
        """

    @abc.abstractmethod
    def take_rows(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return the next bytes of the table rows in the current request's payload. Blocks while they arrive.

        The array is valid until the reply, and only for reading. It may lie in memory that the worker can write to:
        copy values such as ids before checking them.

        Raises:
            UnavailableError: If the connection is lost.
            RemoteProtocolError: If the payload has fewer bytes left.
        """

    def early_values(self, pieces: Sequence[Piece], lock: LockPiece) -> SendValues | None:
        """Begin to send values before the reply, while the payload of the request still comes in.

        Only for requests whose worker asks for just these pieces. Then `reply`, which takes no pieces, sends those that
        are left.

        Returns:
            Sends the pieces; None if this kind of lane gains nothing by it.

        Raises:
            UnavailableError: If the connection is lost.
        """
        return None

    @abc.abstractmethod
    def reply(
        self,
        reply: Reply,
        pieces: Sequence[Piece] = (),
        lock: LockPiece | None = None,
        rows: Sequence[memoryview] = (),
    ) -> None:
        """Answer the current request; the rest of its payload is dropped.

        Args:
            reply: The message.
            pieces: The pieces of values in the reply's payload.
            lock: Held while a piece is read from the store's memory; not called if the worker reads that memory itself.
            rows: The requested rows.

        Raises:
            UnavailableError: If the connection is lost.
        """

    def is_of_program(self, error: Exception) -> bool:
        """Return whether an error during a request was raised by code of the program that made the request."""
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection, and wake a thread that waits in `receive`. Idempotent; any thread may call it."""


@dataclass(frozen=True)
class LaneKind:
    """A kind of lane, as its row of `layout.lanes` names it.

    Attributes:
        lane: Makes the worker's end over a connection whose handshake is done.
        session: Makes the ps's end from such a connection and the incarnation of the worker, on the thread of this
            connection: it may wait for its peer.
        is_local: Whether the lane uses the Unix socket of the ps, which only tasks on its host reach.
        keeps: Returns whether a lane of this kind can go on with the memory of a lane of any kind; see `Lane.open`.
        obstacle: Returns the reason why this machine cannot use the lane; empty if it can.
    """

    lane: Callable[[FrameSocket], Lane]
    session: Callable[[FrameSocket, str], Session]
    is_local: bool = False
    keeps: Callable[[WorkerMemory], bool] = lambda memory: True
    obstacle: Callable[[], str] = lambda: ""
