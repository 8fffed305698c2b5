"""One arena of a ps: its values, the rule that updates them, and the locks that keep blocks whole."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from paramserver.arena import BLOCK, ArenaLayout, Range, num_blocks, pieces
from paramserver.rules import RULES, Setting, setting_names
from paramserver.store.block_rule import BlockRule

Operation = Literal["rule", "assign", "add"]


class StoredArena:
    """Values, slots and versions of one arena.

    Thread-safe. Every operation works on pieces, each inside one block, under the block's lock; two pushes to
    different blocks run side by side, and what is read of one block is of one version.

    Args:
        layout: What lies where.
        values: The flat values, shared or private.
        versions: A counter for each block: odd while the block is written.
    """

    def __init__(self, layout: ArenaLayout, values: torch.Tensor, versions: npt.NDArray[np.uint64]) -> None:
        self.layout = layout
        self.values = values
        self._versions = versions
        count = num_blocks(layout.size)
        self._locks = [threading.Lock() for _ in range(count)]
        self._rules = (
            [BlockRule(layout.rule, values[block * BLOCK : (block + 1) * BLOCK]) for block in range(count)]
            if layout.rule
            else []
        )
        self._setting_names = frozenset(setting_names(RULES[layout.rule.name]) if layout.rule else ())

    def check(
        self, operation: Operation, ranges: Sequence[Range] | None, settings: Collection[str] | None
    ) -> None:
        """Whether `apply` can do this, so that a push of several parts is applied whole or not at all.

        Raises:
            ValueError: If there is no rule, no such setting, or a range is none of this arena.
        """
        if operation == "rule":
            if self.layout.rule is None:
                raise ValueError("no update rule was declared for it")
            if settings and not self._setting_names.issuperset(settings):
                unknown = min(set(settings) - self._setting_names)
                raise ValueError(f"update rule {self.layout.rule.name} has no setting {unknown!r}")
        for start, stop in ranges or ():
            if not 0 <= start < stop <= self.layout.size:
                raise ValueError(f"[{start}, {stop}) is no range of its {self.layout.size} elements")

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
                    first = block * BLOCK
                    self._rules[block].apply(start - first, stop - first, source, settings or {})
                elif operation == "assign":
                    self.values[start:stop].copy_(source)
                else:
                    self.values[start:stop].add_(source)
            finally:
                self._versions[block] += 1

    def check_piece(self, piece: Range) -> None:
        """Raises ValueError unless these are elements of one block."""
        start, stop = piece
        if not 0 <= start < stop <= self.layout.size or start // BLOCK != (stop - 1) // BLOCK:
            raise ValueError(f"[{start}, {stop}) is no piece of one block of its {self.layout.size} elements")

    def update(self, operation: Literal["assign", "add"], piece: Range, source: torch.Tensor) -> torch.Tensor:
        """Assign or add to a piece as `apply` does; a copy of what this very update has made of it."""
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

    def read(self, piece: Range, out: torch.Tensor) -> None:
        """Copy a piece into ``out``, whole."""
        start, stop = piece
        with self._locks[start // BLOCK]:
            out.copy_(self.values[start:stop])

    def copy(self, piece: Range) -> torch.Tensor:
        """A copy of a piece, whole."""
        start, stop = piece
        with self._locks[start // BLOCK]:
            return self.values[start:stop].clone()

    @property
    def slots_bytes(self) -> int:
        """Bytes of all optimizer state."""
        return sum(rule.slot_bytes for rule in self._rules)

    # --- checkpoints

    def snapshot(self) -> tuple[torch.Tensor, list[tuple[int, int, dict[str, torch.Tensor]]]]:
        """A copy of the values, and a copy of the slots as runs ``(start, stop, state)``; block by block."""
        values = torch.empty_like(self.values)
        runs: list[tuple[int, int, dict[str, torch.Tensor]]] = []
        for block, (start, stop) in enumerate(self.layout.pieces):
            with self._locks[block]:
                values[start:stop].copy_(self.values[start:stop])
                if self._rules:
                    runs.extend(
                        (start + first, start + last, {name: slot.clone() for name, slot in state.items()})
                        for first, last, state in self._rules[block].slots()
                    )
        return values, runs

    def load_slots(self, span: Range, state: dict[str, torch.Tensor]) -> None:
        """Put back the slots of a range: flat tensors as long as the range, or scalars.

        Raises:
            ValueError: If they are not the slots of this arena's rule.
        """
        if not self._rules:
            raise ValueError("no optimizer of this model updates it")
        # With the gap behind it, or else gaps without slots would keep neighbours apart for ever; see `join_runs`.
        end = self.layout.gap_end(span[1])
        gap = end - span[1]
        state = {name: F.pad(slot, (0, gap)) if slot.ndim and gap else slot for name, slot in state.items()}
        for start, stop in pieces([(span[0], end)]):
            block = start // BLOCK
            part = {
                name: slot if slot.ndim == 0 else slot[start - span[0] : stop - span[0]]
                for name, slot in state.items()
            }
            with self._locks[block]:
                self._rules[block].load(start - block * BLOCK, stop - block * BLOCK, part)

    def join_runs(self) -> None:
        """After the slots of all variables were put back: serve those that are alike by one update again."""
        for lock, rule in zip(self._locks, self._rules, strict=False):
            with lock:
                rule.join()


def variable_slots(
    span: Range, runs: list[tuple[int, int, dict[str, torch.Tensor]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The slots of one variable, flat, put together from the runs that it lies in.

    None where they cover it in part: a first push was under way then, and had reached only some of its blocks.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    covered = 0
    for start, stop, state in runs:
        first, last = max(start, span[0]), min(stop, span[1])
        if first < last:
            covered += last - first
            for name, slot in state.items():
                parts.setdefault(name, []).append(slot if slot.ndim == 0 else slot[first - start : last - start])
    if covered < span[1] - span[0]:
        return
    for name, slots in parts.items():
        yield name, slots[0] if slots[0].ndim == 0 else torch.cat(slots)
