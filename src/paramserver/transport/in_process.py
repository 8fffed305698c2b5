"""The lane inside one process: the worker uses the store's own memory, and a request is a function call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from paramserver.errors import LocalProtocolError
from paramserver.layout.arena import ArenaLayout
from paramserver.memory.arena_memory import StoreMemory
from paramserver.memory.rows import Rows
from paramserver.transport.lane import Lane, LockPiece, Piece, Session, TableRows, WorkerMemory
from paramserver.wire.messages import Refused, Reply, Request

_CARRIES_OUT = frozenset({"paramserver", "torch", "numpy", "numba"})
"""Packages whose code carries out requests; an error raised in any other package comes from the program."""


class InProcessSession(Session):
    """The store's end; see `Session`. Its replies are kept for the lane that shares it."""

    def __init__(self, task: str, incarnation: str) -> None:
        self.task = task
        self.incarnation = incarnation
        self.memory = StoreMemory([], [])
        self.gradients: list[torch.Tensor] = []
        self.answer: Reply | None = None
        self.rows: list[memoryview] = []

    def receive(self) -> Request | None:
        raise LocalProtocolError("a session inside one process is handed its requests, it does not wait for them")

    def open(self, layouts: Sequence[ArenaLayout], memory: StoreMemory) -> None:
        self.memory = memory

    def gradient(self, piece: Piece) -> torch.Tensor:
        return self.gradients[piece.arena][piece.start : piece.stop]

    def take_rows(self, nbytes: int) -> npt.NDArray[np.uint8]:
        taken = np.empty(nbytes, dtype=np.uint8)
        self.copy_next_rows(taken.data)
        return taken

    def copy_next_rows(self, out: memoryview) -> None:
        """Fill ``out`` with the next rows, which must have the same number of bytes."""
        if not self.rows or self.rows[0].nbytes != out.nbytes:
            held = self.rows[0].nbytes if self.rows else 0
            raise LocalProtocolError(f"{self.task} asked for {out.nbytes} bytes of rows, and was given {held}")
        out[:] = self.rows.pop(0)

    def reply(
        self,
        reply: Reply,
        pieces: Sequence[Piece] = (),
        lock: LockPiece | None = None,
        rows: Sequence[memoryview] = (),
    ) -> None:
        self.answer = reply
        self.rows = list(rows)

    def is_of_program(self, error: Exception) -> bool:
        # A signal handler or a torch mode of the program may run in the middle of a request here.
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
        return module.partition(".")[0] not in _CARRIES_OUT

    def close(self) -> None:
        self.gradients = []


class InProcessLane(Lane):
    """The worker's end; see `Lane`.

    Args:
        task: The name of the ps, for messages.
        session: The store's end.
        handle: Carries out one request and answers it on the session.
    """

    name = "in process"

    def __init__(self, task: str, session: InProcessSession, handle: Callable[[Session, Request], None]) -> None:
        self.task = task
        self._session = session
        self._handle = handle
        self._layouts: Sequence[ArenaLayout] = ()

    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
        self._layouts = layouts
        return self._use(kept.gradients if kept else self._new_gradients())

    def renew(self) -> WorkerMemory:
        return self._use(self._new_gradients())

    def _new_gradients(self) -> list[torch.Tensor]:
        return [
            torch.zeros(layout.on_worker.size, dtype=values.dtype, device=values.device)
            for layout, values in zip(self._layouts, self._session.memory.values, strict=True)
        ]

    def _use(self, gradients: list[torch.Tensor]) -> WorkerMemory:
        self._session.gradients = gradients
        return WorkerMemory(self._session.memory.values, gradients, direct=True)

    def start(self, request: Request, outgoing: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> None:
        self._session.rows = list(rows)
        self._handle(self._session, request)

    def finish(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Reply:
        reply, self._session.answer = self._session.answer, None
        if reply is None:
            raise LocalProtocolError(f"{self.task} has no request to answer")
        if not isinstance(reply, Refused):
            for out in rows:
                self._session.copy_next_rows(out)
        return reply

    def copy_rows(self, arena: int, rows: TableRows) -> bool:
        values, (ids, out) = self._session.memory.values[arena], rows
        table = Rows(values.view(-1, out.shape[1]))
        if values.is_cpu:
            table.take(ids, out)
        else:
            out.copy_(table.take(ids))
        return True

    def close(self) -> None:
        self._session.close()
