"""A table of a ps: one variable whose rows are read and updated one by one.

Rules
    * The table has one lock. An update takes the rows out, computes, and puts them back, or computes in place; the
      blocks of the rows are marked as being written only while their memory changes, so that readers of the memory
      hardly wait.
    * A reader sees each row as one update has left it.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import num_blocks, touched_blocks
from paramserver.layout.rules import find_rule, row_fault
from paramserver.layout.settings import Setting
from paramserver.store.blocks import Operation, StoredBlocks
from paramserver.store.tables.row_rule import RowRule, RowUpdate


class StoredTable(StoredBlocks):
    """The rows of one table or of a part of one, which are updated one by one; see `StoredArena` for the arguments."""

    def __init__(self, layout: ArenaLayout, values: torch.Tensor, versions: npt.NDArray[np.uint64]) -> None:
        assert layout.rule is not None  # noqa: S101  # the store has checked it
        rows, self._width = layout.table_shape
        self._table = values.view(rows, self._width)
        found = find_rule(layout.rule)
        self._rule = RowRule(layout.rule, self._table, found)
        self._lock = threading.Lock()  # for all blocks
        count = num_blocks(layout.size)
        slots = [self._rule.block(each) for each in range(count)]
        super().__init__(layout, values, versions, [self._lock] * count, slots, found)

    def check_rows(self, operation: Operation, count: int, settings: dict[str, Setting] | None) -> None:
        """Check that `apply_rows` can do this with so many rows.

        Raises:
            ValueError: If the table has fewer rows, or the rule has no such setting.
        """
        if not 0 <= count <= len(self._table):
            raise ValueError(f"it has {len(self._table)} rows, and {count} different ones were named")
        if operation == "rule":
            self.check_settings(settings or {})
            if fault := row_fault(settings or {}):
                raise ValueError(fault)

    def check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        """Check that these are ids of rows, ascending and unique.

        Raises:
            ValueError: If they are not.
        """
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
            operation: The operation.
            ids: ``[rows]``; see `check_ids`.
            source: ``[rows, width]``: gradients, or values.
            settings: Settings of the rule.
        """
        source = source.to(self._table.device)
        touched = touched_blocks(ids, self._width, len(self._versions))
        with self._lock:
            if operation == "rule":
                self.is_trained = True
                update = self._rule.update(ids, source, settings or {})
            else:
                fresh = source if operation == "assign" else self._rule.rows.take(ids).add_(source)
                update = RowUpdate(self._rule.rows.put, (ids, fresh))
            self._versions[touched] += 1
            try:
                update.apply()
            finally:
                self._versions[touched] += 1

    def read_rows(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return a copy ``[rows, width]`` of rows."""
        with self._lock:
            return self._rule.rows.take(ids).cpu()

    @property
    def slots_bytes(self) -> int:
        """Size of all optimizer state in bytes."""
        return self._rule.slot_bytes

    def join_runs(self) -> None:
        """Do nothing: the slots of a table are in one piece."""
