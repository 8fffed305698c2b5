"""The lane between hosts: payloads go by TCP, straight from and into the memory in use.

A ps receives one piece of a gradient at a time and applies it while the next one is under way, so each connection needs
one block of memory and not a copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paramserver.errors import RemoteProtocolError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.memory.arena_memory import StoreMemory, payload_memory, tensor_bytes
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import Lane, LaneKind, LockPiece, Piece, SendValues, Session, WorkerMemory, whole_blocks
from paramserver.transport.together import Steps
from paramserver.wire import codec
from paramserver.wire.messages import EarlyValues, Message, Refused, Reply, Request
from paramserver.wire.payload import EARLY_BYTES

NOTHING = memoryview(b"")

IN_PLACE = 8 << 20
"""Size of values in bytes from which on they are sent from the store's own memory. With a smaller model, workers wait
for the same few locks, and a ps that wakes a worker by sending may lose its core to it while it holds a lock."""


class TcpLane(Lane):
    """The worker's end; see `Lane`."""

    name = "tcp"

    def __init__(self, frames: FrameSocket) -> None:
        self.task = frames.task
        self._frames = frames
        self._layouts: Sequence[ArenaLayout] = ()
        self._memory = WorkerMemory([], [])
        self._gradients = _Bytes([], [])
        self._values = _Bytes([], [])

    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
        self._layouts = layouts
        memory = kept or WorkerMemory(values=[_tensor(layout) for layout in layouts], gradients=_gradients(layouts))
        self._values = _Bytes(layouts, memory.values)
        return self._use(memory)

    def renew(self) -> WorkerMemory:
        return self._use(dataclasses.replace(self._memory, gradients=_gradients(self._layouts)))

    def _use(self, memory: WorkerMemory) -> WorkerMemory:
        self._memory = memory
        self._gradients = _Bytes(self._layouts, memory.gradients)
        return memory

    def start(self, request: Request, outgoing: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> None:
        views = [*rows, *map(self._gradients.of, outgoing)]
        is_large = sum(view.nbytes for view in views) >= EARLY_BYTES
        (self._frames.begin if is_large else self._frames.send)(request, views)

    def finish(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Reply:
        reply, views = expect_reply(self._frames), [*rows, *map(self._values.of, incoming)]
        if isinstance(reply, EarlyValues):
            self._receive(views)
            reply, views = expect_reply(self._frames), []
        if not isinstance(reply, Refused):
            self._receive(views)
        return reply

    def finishing(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Steps:
        return Steps(self._frames, self._moves([*rows, *map(self._values.of, incoming)]))

    def _receive(self, views: Sequence[memoryview]) -> None:
        for view in views:
            self._frames.receive_into(view)

    def _moves(self, views: Sequence[memoryview]) -> Generator[None, None, Reply]:
        """Do `finish`; yield instead of waiting."""
        reply = yield from self._next_reply()
        if isinstance(reply, EarlyValues):
            yield from self._receive_gradually(views)
            reply, views = (yield from self._next_reply()), []
        if not isinstance(reply, Refused):
            yield from self._receive_gradually(views)
        return reply

    def _next_reply(self) -> Generator[None, None, Reply]:
        while not self._frames.gather():
            yield
        return expect_reply(self._frames)

    def _receive_gradually(self, views: Sequence[memoryview]) -> Generator[None, None, None]:
        for view in views:
            received = 0
            while received < view.nbytes:
                count = self._frames.receive_now(view[received:])
                received += count
                if not count:
                    yield

    def close(self) -> None:
        self._frames.close()


class TcpSession(Session):
    """The ps's end; see `Session`."""

    def __init__(self, frames: FrameSocket, incarnation: str) -> None:
        self.task = frames.task
        self.incarnation = incarnation
        self._frames = frames
        self._layouts: Sequence[ArenaLayout] = ()
        self._scratch = np.empty(0, dtype=np.uint8)
        self._rooms: dict[Piece, _Room] = {}
        self._values = _Bytes([], [])
        self._early: _Outgoing | None = None
        self._early_scratch = self._scratch

    def receive(self) -> Request | None:
        return self._frames.receive()  # type: ignore[return-value]  # the server refuses anything else than a request

    def open(self, layouts: Sequence[ArenaLayout], memory: StoreMemory) -> None:
        self._layouts = layouts
        largest = max((min(layout.size, BLOCK) * layout.itemsize for layout in layouts), default=0)
        self._scratch = payload_memory(largest).numpy()
        self._rooms = {piece: self._room(piece) for piece in whole_blocks(layouts)}
        self._values = _Bytes(layouts, memory.values)

    def gradient(self, piece: Piece) -> torch.Tensor:
        if piece.arena >= len(self._layouts):
            raise RemoteProtocolError(f"{self.task} pushed to arena {piece.arena} before it declared its arenas")
        room = self._rooms.get(piece) or self._room(piece)
        self._frames.receive_into(room.content)
        return room.elements

    def take_rows(self, nbytes: int) -> npt.NDArray[np.uint8]:
        taken = np.empty(nbytes, dtype=np.uint8)
        self._frames.receive_into(taken.data)
        return taken

    def early_values(self, pieces: Sequence[Piece], lock: LockPiece) -> SendValues:
        if not self._early_scratch.nbytes:
            self._early_scratch = payload_memory(self._scratch.nbytes).numpy()  # the other one receives meanwhile
        self._early = self._outgoing(EarlyValues(), pieces, lock, self._early_scratch)
        return partial(self._send, self._early)

    def reply(
        self,
        reply: Reply,
        pieces: Sequence[Piece] = (),
        lock: LockPiece | None = None,
        rows: Sequence[memoryview] = (),
    ) -> None:
        self._frames.discard_payload()  # a worker that is still sending its payload would not read the reply
        if self._early is not None:
            self._send(self._early, len(self._early.pieces))
            self._early = None
        if rows:
            self._frames.send(reply, rows)
            return
        if lock is None or not pieces:
            self._frames.send(reply)
            return
        self._send(self._outgoing(reply, pieces, lock, self._scratch), len(pieces))

    def close(self) -> None:
        self._frames.close()

    def _nbytes(self, piece: Piece) -> int:
        return (piece.stop - piece.start) * self._layouts[piece.arena].itemsize

    def _outgoing(
        self, reply: Reply, pieces: Sequence[Piece], lock: LockPiece, scratch: npt.NDArray[np.uint8]
    ) -> _Outgoing:
        total = sum(map(self._nbytes, pieces))
        return _Outgoing(memoryview(codec.encode(reply, total)), pieces, lock, scratch, in_place=total >= IN_PLACE)

    def _send(self, values: _Outgoing, count: int) -> None:
        """Send the first ``count`` pieces of the store's values, each as it is under its lock.

        No lock is held while this waits for the peer: the kernel takes as much as it can from the store's own memory;
        the rest is copied and sent after the lock.
        """
        for piece in values.pieces[values.num_sent : count]:
            if values is self._early:
                self._frames.flush()  # the scratch memory is needed again
            content, head = self._values.of(piece), values.head
            if values.in_place and not head:
                self._frames.await_room()
            with values.lock(piece):
                sent = self._frames.send_now([head, content]) if values.in_place else 0
                rest = _copied(content, max(sent - head.nbytes, 0), values.scratch)
            if values is self._early:
                self._frames.send_soon([head[sent:], rest])
            else:
                self._frames.send_views([head[sent:], rest])
            values.head = NOTHING
            values.num_sent += 1

    def _room(self, piece: Piece) -> _Room:
        content = self._scratch[: self._nbytes(piece)]
        return _Room(torch.from_numpy(content).view(self._layouts[piece.arena].torch_dtype), content.data)


@dataclasses.dataclass
class _Outgoing:
    """Values on their way to a worker.

    Attributes:
        head: The bytes to send before the next piece.
        pieces: All pieces, in order.
        lock: Keeps a piece unchanged.
        scratch: Memory for one piece.
        in_place: Whether the pieces are sent from the store's own memory, as far as possible.
        num_sent: Number of pieces that were handed over.
    """

    head: memoryview
    pieces: Sequence[Piece]
    lock: LockPiece
    scratch: npt.NDArray[np.uint8]
    in_place: bool
    num_sent: int = 0


class _Room(NamedTuple):
    """The beginning of a session's scratch memory, which holds one piece of a gradient at a time."""

    elements: torch.Tensor
    content: memoryview


class _Bytes:
    """The memory of pieces of flat tensors. Whole blocks, which most steps move, are looked up only once.

    Args:
        layouts: The layouts of the tensors.
        tensors: One for each arena.
    """

    def __init__(self, layouts: Sequence[ArenaLayout], tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._blocks = {piece: self._cut(piece) for piece in whole_blocks(layouts)}

    def of(self, piece: Piece) -> memoryview:
        """Return the memory of a piece."""
        return self._blocks.get(piece) or self._cut(piece)

    def _cut(self, piece: Piece) -> memoryview:
        return tensor_bytes(self._tensors[piece.arena][piece.start : piece.stop])


def _tensor(layout: ArenaLayout) -> torch.Tensor:
    """Make a worker's memory for all values, or all gradients, of an arena."""
    return payload_memory(layout.on_worker.size * layout.itemsize).view(layout.torch_dtype)


def _gradients(layouts: Sequence[ArenaLayout]) -> list[torch.Tensor]:
    return [_tensor(layout).zero_() for layout in layouts]


def _copied(content: memoryview, start: int, scratch: npt.NDArray[np.uint8]) -> memoryview:
    """Return a copy, in ``scratch``, of the rest of ``content``."""
    count = content.nbytes - start
    if not count:
        return NOTHING
    copy = scratch[:count]
    np.copyto(copy, np.frombuffer(content, np.uint8, count, start))
    return copy.data


def expect_reply(frames: FrameSocket) -> Reply:
    """Return the next message.

    Raises:
        UnavailableError: If the stream has ended.
    """
    reply: Message | None = frames.receive()
    if reply is None:
        raise UnavailableError(f"{frames.task} closed the connection instead of answering; has it died?", frames.task)
    return reply  # type: ignore[return-value]  # the client checks for the reply that it expects


KIND = LaneKind(TcpLane, TcpSession)
