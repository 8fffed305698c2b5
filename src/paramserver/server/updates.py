"""The application of one push: its rows and pieces, part by part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import ID_BYTES
from paramserver.server.push_plans import Application
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


def apply_all(
    session: Session,
    progress: Progress,
    rows: Sequence[TakenRows],
    applications: Sequence[Application],
    send_values: SendValues | None = None,
    answers: Sequence[int] = (),
) -> float:
    """Apply the parts of an update that are not applied yet; return the seconds, without waiting for the parts.

    Args:
        session: The session of the worker.
        progress: What was applied of this update.
        rows: The parts that concern rows of tables.
        applications: All other parts.
        send_values: Sends early values, if there are any.
        answers: After each application, how many of these to send.
    """
    seconds = 0.0
    for taken in rows[progress.done :]:
        progress.enter_part()
        seconds += taken.apply()
        progress.leave_part()
    applied = progress.done - len(rows)
    for index, application in enumerate(applications):
        if index < applied:  # when it came for the first time
            session.gradient(application.piece)
        else:
            seconds += _apply(session, progress, application)
        if send_values is not None:
            send_values(answers[index])
    return seconds


def _apply(session: Session, progress: Progress, application: Application) -> float:
    """Apply a piece as soon as it is here, and return the seconds that this took."""
    arena, operation, piece, settings = application
    gradient = session.gradient(piece)
    begun = time.perf_counter()
    progress.enter_part()
    arena.apply(operation, (piece.start, piece.stop), gradient, settings)
    progress.leave_part()
    return time.perf_counter() - begun
