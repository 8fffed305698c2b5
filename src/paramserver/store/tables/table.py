"""A table of a ps: one variable whose rows are read and updated one by one.

Rules
    * What is changed at once is locked as a whole. An update takes the rows out, computes, and puts them back, or
      computes where they lie; only while their memory changes are their blocks marked as being written, so that who
      reads it hardly waits.
    * A reader sees each row as one update has left it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from paramserver.layout.blocks import Range, touched_blocks
from paramserver.layout.rules import Setting, row_fault
from paramserver.store.arena import Operation, StoredArena
from paramserver.store.tables.row_rule import RowRule


class StoredTable(StoredArena):
    """The rows of one table, or of a part of one. The arguments are those of `StoredArena`."""

    def _divide(self, count: int) -> None:
        assert self.layout.rule is not None  # noqa: S101  # the store has checked it
        rows, self._width = self.layout.table_shape
        self._table = self.values.view(rows, self._width)
        self._rule = RowRule(self.layout.rule, self._table)
        self._lock = threading.Lock()  # one for all blocks
        self._locks = [self._lock] * count
        self._slots = [self._rule.block(block) for block in range(count)]

    def check(
        self, operation: Operation, ranges: Sequence[Range] | None, settings: Mapping[str, Setting] | None
    ) -> None:
        """Raises ValueError: a table is changed row by row."""
        raise ValueError("it is a table, of which rows are pushed")

    def check_rows(self, operation: Operation, count: int, settings: dict[str, Setting] | None) -> None:
        """Whether `apply_rows` can do this with as many rows.

        Raises:
            ValueError: If there are fewer rows, or the rule has no such setting.
        """
        if not 0 <= count <= len(self._table):
            raise ValueError(f"it has {len(self._table)} rows, and {count} different ones were named")
        if operation == "rule":
            self._check_settings(settings or {})
            if fault := row_fault(settings or {}):
                raise ValueError(fault)

    def check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        """Raises ValueError unless these are ids of rows, ascending and none twice."""
        if len(ids) and (ids[0] < 0 or ids[-1] >= len(self._table) or np.any(ids[1:] <= ids[:-1])):
            raise ValueError(f"the ids of its {len(self._table)} rows must ascend from 0, none twice, and be less")

    def apply_rows(
        self,
        operation: Operation,
        ids: npt.NDArray[np.int64],
        source: torch.Tensor,
        settings: dict[str, Setting] | None,
    ) -> None:
        """Run the rule on rows, or assign or add to them.

        Args:
            operation: What to do.
            ids: ``[rows]``; see `check_ids`.
            source: ``[rows, width]``: gradients, or values.
            settings: Of the rule.
        """
        source = source.to(self._table.device)
        touched = touched_blocks(ids, self._width, len(self._versions))
        with self._lock:
            if operation == "rule":
                self.is_trained = True
                write = self._rule.update(ids, source, settings or {})
            else:
                fresh = source if operation == "assign" else self._rule.rows.take(ids).add_(source)
                write = functools.partial(self._rule.rows.put, ids, fresh)
            self._versions[touched] += 1
            try:
                write()
            finally:
                self._versions[touched] += 1

    def read_rows(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy ``[rows, width]`` of rows."""
        with self._lock:
            return self._rule.rows.take(ids).cpu()

    @property
    def slots_bytes(self) -> int:
        return self._rule.slot_bytes

    def join_runs(self) -> None:
        """There are no runs: the slots of a table are in one piece."""
