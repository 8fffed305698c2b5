"""One arena of a ps: its values, the rule that updates them, and the locks that keep blocks whole."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK, Range, num_blocks
from paramserver.layout.rules import find_rule
from paramserver.layout.settings import Setting
from paramserver.store.block_rule import BlockRule
from paramserver.store.blocks import Operation, StoredBlocks


class StoredArena(StoredBlocks):
    """Dense variables, which are updated by ranges.

    Every operation works on pieces, each inside one block, under the lock of the block. Two pushes to different blocks
    run in parallel, and all that is read from one block is of one version.

    Args:
        layout: Which variables lie where.
        values: The flat values, shared or private.
        versions: A counter for each block, odd while the block is written.
    """

    def __init__(self, layout: ArenaLayout, values: torch.Tensor, versions: npt.NDArray[np.uint64]) -> None:
        blocks = range(num_blocks(layout.size))
        rule = layout.rule
        found = find_rule(rule) if rule else None
        cut = [values[block * BLOCK : (block + 1) * BLOCK] for block in blocks] if rule else []
        self._rules = [BlockRule(rule, each, found) for each in cut] if rule else []
        self._slot_settings = found.slot_settings if found else {}
        super().__init__(layout, values, versions, [threading.Lock() for _ in blocks], self._rules, found)

    def check(
        self, operation: Operation, ranges: Sequence[Range] | None, settings: Mapping[str, Setting] | None
    ) -> None:
        """Check that `apply` can do this, so that a push of several parts is applied as a whole or not at all.

        Raises:
            ValueError: If there is no rule or no such setting, a range is not within this arena, or the ranges do not
                ascend.
        """
        if operation == "rule":
            if self.layout.rule is None:
                raise ValueError("no update rule was declared for it")
            self.check_settings(settings or {})
        end = 0
        for start, stop in ranges or ():
            if not 0 <= start < stop <= self.layout.size:
                raise ValueError(f"[{start}, {stop}) is not a range of its {self.layout.size} elements")
            if start < end:
                raise ValueError(f"[{start}, {stop}) begins before the end of the range before it, {end}")
            end = stop

    def apply(
        self,
        operation: Operation,
        piece: Range,
        source: torch.Tensor,
        settings: dict[str, Setting] | None,
    ) -> None:
        """Run the rule on a piece, or assign or add to it. ``source`` is flat and as long as the piece."""
        start, stop = piece
        block = start // BLOCK
        with self._locks[block]:
            self._versions[block] += 1
            try:
                if operation == "rule":
                    self.is_trained = True
                    first = block * BLOCK
                    self._rules[block].apply(start - first, stop - first, source, settings or {})
                elif operation == "assign":
                    self.values[start:stop].copy_(source)
                else:
                    self.values[start:stop].add_(source)
            finally:
                self._versions[block] += 1

    def check_settings(self, settings: Mapping[str, Setting]) -> None:
        """Check that the rule has all of these settings, and all slots that they need.

        Raises:
            ValueError: If a setting is unknown, or a slot that it needs was never made.
        """
        super().check_settings(settings)
        for name, slot in self._slot_settings.items():
            if settings.get(name) and any(block.lacks(slot) for block in self._rules):
                assert self.layout.rule is not None  # noqa: S101  # it has settings
                raise ValueError(
                    f"{self.layout.rule.name} was made with {name} off, and what it has updated so far has no "
                    f"{slot!r}; set {name} before the first step"
                )

    def update(self, operation: Literal["assign", "add"], piece: Range, source: torch.Tensor) -> torch.Tensor:
        """Assign or add to a piece as `apply` does, and return a copy of the values that this very update produced."""
        start, stop = piece
        values = self.values[start:stop]
        block = start // BLOCK
        with self._locks[block]:
            self._versions[block] += 1
            try:
                (values.copy_ if operation == "assign" else values.add_)(source)
            finally:
                self._versions[block] += 1
            return values.clone()

    @property
    def slots_bytes(self) -> int:
        """Size of all optimizer state in bytes."""
        return sum(rule.slot_bytes for rule in self._rules)

    def join_runs(self) -> None:
        """Join runs with equal state after all slots were restored, so that one update serves them again."""
        for lock, rule in zip(self._locks, self._rules, strict=False):
            with lock:
                rule.join()
