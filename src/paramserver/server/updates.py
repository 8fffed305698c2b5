"""The application of one push: its rows, and its pieces one by one or side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import ID_BYTES
from paramserver.memory.side_by_side import side_by_side
from paramserver.server.push_plans import Application, PushPlan
from paramserver.store.progress import Progress
from paramserver.store.tables.table import StoredTable
from paramserver.transport.lane import SendValues, Session
from paramserver.wire.messages import Part


@dataclass(frozen=True)
class TakenRows:
    """Rows of a part of a push that have arrived and were checked.

    Attributes:
        table: The table.
        part: The part.
        ids: ``[rows]``, ascending and unique.
        values: ``[rows, width]``.
    """

    table: StoredTable
    part: Part
    ids: npt.NDArray[np.int64]
    values: torch.Tensor

    def apply(self) -> float:
        """Apply the rows, and return the seconds that this took."""
        begun = time.perf_counter()
        self.table.apply_rows(self.part.operation, self.ids, self.values, self.part.settings)
        return time.perf_counter() - begun


def taken_ids(session: Session, count: int) -> npt.NDArray[np.int64]:
    """Take the ids of rows, as a copy that the worker cannot change any more."""
    return session.take_rows(count * ID_BYTES).view(np.int64).copy()


def taken_values(session: Session, layout: ArenaLayout, count: int) -> torch.Tensor:
    """Take the values of rows, ``[count, width]``."""
    row_bytes = layout.table_shape[1] * layout.itemsize
    taken = session.take_rows(count * row_bytes).reshape(count, row_bytes)
    return torch.from_numpy(taken).view(layout.torch_dtype)


@dataclass(frozen=True)
class Update:
    """A push on its way into the store.

    Attributes:
        session: The session of the worker.
        progress: What was applied of it when it came before.
        rows: The parts that concern rows of tables.
        plan: All other parts.
    """

    session: Session
    progress: Progress
    rows: Sequence[TakenRows]
    plan: PushPlan

    @property
    def num_parts(self) -> int:
        """Number of its parts."""
        return len(self.rows) + len(self.plan.applications)

    def apply(self, send_values: SendValues | None) -> float:
        """Apply the parts that are not applied yet; return the seconds, without waiting for the parts.

        Args:
            send_values: Sends early values, if there are any.
        """
        seconds = self._apply_rows()
        num_applied = self.progress.done - len(self.rows)
        if self.session.is_at_hand and not num_applied:
            return seconds + self._apply_side_by_side()
        return seconds + self._apply_in_turn(num_applied, send_values)

    def _apply_rows(self) -> float:
        seconds = 0.0
        for taken in self.rows[self.progress.done :]:
            self.progress.enter_part()
            seconds += taken.apply()
            self.progress.leave_part()
        return seconds

    def _apply_in_turn(self, num_applied: int, send_values: SendValues | None) -> float:
        """Apply pieces as they come. The first ``num_applied`` were applied when they came before."""
        seconds = 0.0
        for index, application in enumerate(self.plan.applications):
            gradient = self.session.gradient(application.piece)
            if index >= num_applied:
                begun = time.perf_counter()
                self.progress.enter_part()
                _apply(application, gradient)
                self.progress.leave_part()
                seconds += time.perf_counter() - begun
            if send_values is not None:
                send_values(self.plan.answers[index])
        return seconds

    def _apply_side_by_side(self) -> float:
        begun, applied = time.perf_counter(), list[Application]()

        def apply(application: Application) -> None:
            _apply(application, self.session.gradient(application.piece))
            applied.append(application)

        self.progress.enter_part()
        try:
            side_by_side([partial(apply, application) for application in self.plan.applications])
        finally:
            self.progress.leave_part(len(applied))
        return time.perf_counter() - begun


def _apply(application: Application, gradient: torch.Tensor) -> None:
    arena, operation, piece, settings = application
    arena.apply(operation, (piece.start, piece.stop), gradient, settings)
