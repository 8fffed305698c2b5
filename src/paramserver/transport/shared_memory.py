"""The lane inside one host: gradients and values are in shared memory, a Unix socket carries the messages.

The worker's gradient memory is a file that the ps maps for reading, so the ps reads a gradient where autograd wrote it.
Pushed rows of tables are copied into another such file. The ps's values are a file that workers map for reading. A
worker copies them block by block; a block whose version differs before and after its copy was torn, and is copied
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from paramserver.errors import LocalProtocolError, RemoteProtocolError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK, blocks_of_rows, touched_blocks
from paramserver.memory import arena_memory, shared_file
from paramserver.memory.arena_memory import HasFileno, StoreMemory
from paramserver.memory.rows import Rows
from paramserver.memory.side_by_side import side_by_side
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import (
    Lane,
    LaneKind,
    LockPiece,
    Piece,
    Session,
    TableRows,
    WorkerMemory,
    whole_blocks,
)
from paramserver.transport.tcp import expect_reply
from paramserver.wire.messages import Done, Refused, Reply, Request, Share
from paramserver.wire.refusals import expect

ORDERED = frozenset({"x86_64", "amd64", "i386", "i686"})
"""Machines whose processors keep the order of loads and of stores, by the names of ``platform.machine()``."""
TORN_READ_LIMIT = 10.0
"""Seconds after which a block still being written means that its writer died."""
QUIET_LIMIT = 5e-3
"""Seconds to wait for a pause in the writes to rows before copying them nevertheless."""
ROW_TRIES = 16
"""Number of further copies of rows that are written to meanwhile, before the ps is asked for them."""


class SharedMemoryLane(Lane):
    """The worker's end; see `Lane`."""

    name = "shared memory"

    def __init__(self, frames: FrameSocket) -> None:
        self.task = frames.task
        self._frames = frames
        self._layouts: Sequence[ArenaLayout] = ()
        self._copies: dict[Piece, _BlockCopy] = {}
        self._row_copies: dict[int, _RowsCopy] = {}
        self._mine = WorkerMemory([], [])
        self._theirs = StoreMemory([], [])
        self._rows = arena_memory.RowsFile(np.empty(0, dtype=np.uint8))

    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
        self._layouts = layouts
        return self._use(kept or _worker_memory(layouts))

    def renew(self) -> WorkerMemory:
        file, gradients = _gradients(self._layouts)
        return self._use(dataclasses.replace(self._mine, gradients=gradients, file=file))

    def _use(self, mine: WorkerMemory) -> WorkerMemory:
        self._mine, layouts = mine, self._layouts
        if self._mine.file is None:
            raise LocalProtocolError(f"{self.task} cannot map the gradients of a lane that shared none")
        # Not kept: the ps may still be applying rows from the rows file of a lost connection.
        with contextlib.closing(shared_file.SharedFile.create(arena_memory.rows_bytes(layouts))) as rows:
            values = self._exchange(self._mine.file, rows, arena_memory.store_bytes(layouts))
        values.close()  # the mapping stays
        self._rows = arena_memory.RowsFile(rows.data.numpy())
        self._theirs = arena_memory.store_memory(layouts, values)
        self._copies = {}
        self._row_copies = {
            index: _RowsCopy(self._theirs, index, layout.table_shape[1])
            for index, layout in enumerate(layouts)
            if layout.is_table
        }
        return self._mine

    def start(self, request: Request, outgoing: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> None:
        self._rows.rewind()
        try:
            for view in rows:
                np.copyto(self._rows.next(view.nbytes), view)  # releases the GIL, unlike a copy of memoryviews
        except ValueError as error:
            raise LocalProtocolError(f"{self.task} cannot be sent that many rows at once: {error}") from error
        self._frames.send(request)

    def finish(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Reply:
        reply = expect_reply(self._frames)
        if not isinstance(reply, Refused):
            for out in rows:
                self._frames.receive_into(out)
            side_by_side([self._copy(piece) for piece in incoming])
        return reply

    def copy_rows(self, arena: int, rows: TableRows) -> bool:
        self._frames.check_open()  # the memory of a ps outlives the ps
        return self._row_copies[arena].run(rows)

    def close(self) -> None:
        self._frames.close()

    def _exchange(self, gradients: HasFileno, rows: HasFileno, nbytes: int) -> shared_file.SharedFile:
        self._frames.send(Share())
        expect(expect_reply(self._frames), Done, self.task)
        for file in (gradients, rows):
            self._frames.send_descriptor(file.fileno())
        return shared_file.SharedFile.attach(self._frames.receive_descriptor(), nbytes, self.task)

    def _copy(self, piece: Piece) -> Callable[[], None]:
        copy = self._copies.get(piece)
        if copy is None:
            copy = self._copies[piece] = _BlockCopy(self.task, piece, self._theirs, self._mine)
        return copy.run


def _worker_memory(layouts: Sequence[ArenaLayout]) -> WorkerMemory:
    file, gradients = _gradients(layouts)
    values = [torch.empty(layout.on_worker.size, dtype=layout.torch_dtype) for layout in layouts]
    return WorkerMemory(values, gradients, file=file)


def _gradients(layouts: Sequence[ArenaLayout]) -> tuple[shared_file.SharedFile, list[torch.Tensor]]:
    file = shared_file.SharedFile.create(arena_memory.gradient_bytes(layouts), is_filled=True)
    return file, arena_memory.gradient_tensors(layouts, file.data)


class _BlockCopy:
    """Copies one block of values, again and again until no write has overlapped the copy: a seqlock.

    The writer makes the version odd, writes the values, and makes the version even; the reader reads the version, the
    values, and the version again. This is correct if a processor makes its stores visible in their order and carries
    out its loads in their order, as x86 does. Other processors need a memory fence in between, which Python does not
    have, so they are refused; see `ORDERED`.
    """

    def __init__(self, task: str, piece: Piece, theirs: StoreMemory, mine: WorkerMemory) -> None:
        arena, start, stop = piece
        self._task = task
        self._source = theirs.values[arena][start:stop]
        self._target = mine.values[arena][start:stop]
        self._versions: npt.NDArray[np.uint64] = theirs.versions[arena]
        self._block = start // BLOCK

    def run(self) -> None:
        """Copy the block.

        Raises:
            UnavailableError: If the block is still being written after `TORN_READ_LIMIT`.
        """
        if self._try():
            return
        give_up = time.monotonic() + TORN_READ_LIMIT
        while time.monotonic() < give_up:
            os.sched_yield()
            if self._try():
                return
        raise UnavailableError(
            f"{self._task} has been writing the same block for {TORN_READ_LIMIT} s; has it died?", self._task
        )

    def _try(self) -> bool:
        before = self._versions.item(self._block)
        if before % 2:
            return False
        self._target.copy_(self._source)
        return self._versions.item(self._block) == before


class _RowsCopy:
    """Copies rows of a table, and again those that were written to meanwhile; see `_BlockCopy` for the conditions."""

    def __init__(self, theirs: StoreMemory, arena: int, width: int) -> None:
        self._rows = Rows(theirs.values[arena].view(-1, width))
        self._versions: npt.NDArray[np.uint64] = theirs.versions[arena]
        self._width = width

    def run(self, rows: TableRows) -> bool:
        """Copy rows, and return whether each of them is whole.

        A copy of rows that others write to all the time may never be whole.
        """
        ids, out = rows
        torn = self._copy(ids, out)
        for _ in range(ROW_TRIES):
            if not len(torn):
                break
            os.sched_yield()
            again = torch.empty(len(torn), self._width, dtype=out.dtype)
            still = self._copy(ids[torn], again)
            Rows(out).put(torn, again)
            torn = torn[still]
        return not len(torn)

    def _copy(self, ids: npt.NDArray[np.int64], out: torch.Tensor) -> npt.NDArray[np.intp]:
        """Copy rows, and return the indices of those that have to be copied again."""
        touched = touched_blocks(ids, self._width, len(self._versions))
        before = self._quiet_versions(touched)
        self._rows.take(ids, out)
        torn = touched[(self._versions[touched] != before) | (before % 2 == 1)]
        if not len(torn):  # the test of blocks is cheap, because there are few of them
            return np.empty(0, dtype=np.intp)
        places = blocks_of_rows(ids, self._width)
        return np.flatnonzero(np.logical_or.reduce([np.isin(blocks, torn) for blocks in places]))

    def _quiet_versions(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Return the versions of blocks, after a short wait for a moment in which no block is written.

        Waiting takes less time than copying in vain.
        """
        versions = self._versions[blocks]
        give_up = time.perf_counter() + QUIET_LIMIT
        while np.any(versions % 2) and time.perf_counter() < give_up:
            os.sched_yield()
            versions = self._versions[blocks]
        return versions


class SharedMemorySession(Session):
    """The ps's end; see `Session`."""

    is_at_hand = True

    def __init__(self, frames: FrameSocket, incarnation: str) -> None:
        self.task = frames.task
        self.incarnation = incarnation
        self._frames = frames
        self._layouts: Sequence[ArenaLayout] = ()
        self._memory = StoreMemory([], [])
        self._gradients: list[torch.Tensor] = []
        self._blocks: dict[Piece, torch.Tensor] = {}
        self._rows = arena_memory.RowsFile(np.empty(0, dtype=np.uint8))

    def receive(self) -> Request | None:
        self._rows.rewind()
        request = self._frames.receive()
        while isinstance(request, Share):
            self._exchange()
            request = self._frames.receive()
        return request  # type: ignore[return-value]  # the server refuses anything that is not a request

    def open(self, layouts: Sequence[ArenaLayout], memory: StoreMemory) -> None:
        self._layouts = layouts
        self._memory = memory

    def gradient(self, piece: Piece) -> torch.Tensor:
        block = self._blocks.get(piece)
        if block is not None:
            return block
        if piece.arena >= len(self._gradients):
            raise RemoteProtocolError(f"{self.task} pushed to arena {piece.arena} before it shared its gradients")
        return self._cut(piece)

    def take_rows(self, nbytes: int) -> npt.NDArray[np.uint8]:
        try:
            return self._rows.next(nbytes)
        except ValueError as error:
            raise RemoteProtocolError(f"{self.task} pushed rows that are not there: {error}") from error

    def reply(
        self,
        reply: Reply,
        pieces: Sequence[Piece] = (),
        lock: LockPiece | None = None,
        rows: Sequence[memoryview] = (),
    ) -> None:
        self._frames.send(reply, rows)

    def close(self) -> None:
        self._frames.close()

    def _exchange(self) -> None:
        if self._memory.file is None:
            self._frames.send(Refused("refused", "there is nothing to share yet: declare the arenas first"))
            return
        self._frames.send(Done())
        self._gradients = arena_memory.gradient_tensors(
            self._layouts, self._mapped(arena_memory.gradient_bytes(self._layouts))
        )
        self._blocks = {piece: self._cut(piece) for piece in whole_blocks(self._layouts)}
        self._rows = arena_memory.RowsFile(self._mapped(arena_memory.rows_bytes(self._layouts)).numpy())
        self._frames.send_descriptor(self._memory.file.fileno())

    def _cut(self, piece: Piece) -> torch.Tensor:
        return self._gradients[piece.arena][piece.start : piece.stop]

    def _mapped(self, nbytes: int) -> torch.Tensor:
        """Map the file that the worker passes next, and return its memory."""
        file = shared_file.SharedFile.attach(self._frames.receive_descriptor(), nbytes, self.task)
        file.close()  # the mapping stays
        return file.data


def _obstacle() -> str:
    machine = platform.machine()
    if machine.lower() not in ORDERED:
        return f"processors of {machine} may reorder what is read and written, so that blocks could be torn unseen"
    return "" if shared_file.can_share() else "this platform has no anonymous shared files that can be sealed"


KIND = LaneKind(
    SharedMemoryLane,
    SharedMemorySession,
    is_local=True,
    keeps=lambda memory: memory.file is not None,
    obstacle=_obstacle,
)
