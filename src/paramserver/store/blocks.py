"""The common base of arenas and tables of a ps: values in blocks, with locks, versions and slots."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK, Range, num_blocks, pieces
from paramserver.layout.rules import UpdateRule
from paramserver.layout.settings import Setting
from paramserver.layout.settings import fault as setting_fault

Operation = Literal["rule", "assign", "add"]


class SlotKind(NamedTuple):
    """The dtype of a slot, and whether it is a single number for many elements."""

    dtype: str
    is_scalar: bool

    @classmethod
    def of(cls, slot: torch.Tensor) -> SlotKind:
        """Return the kind of a slot."""
        return cls(str(slot.dtype).removeprefix("torch."), slot.ndim == 0)


class BlockCopy:
    """Memory for a copy of a block. It is reused for block after block, so that a checkpoint takes little memory.

    Attributes:
        values: The values of the block, on the CPU.
        runs: The slots of the block as ``(start, stop, state)``; the range counts elements of the arena.
        pause: Seconds that all copies have taken.
        longest: Seconds that the longest copy has taken.
    """

    def __init__(self) -> None:
        self.values = torch.empty(0, device="cpu")
        self.runs: list[tuple[int, int, dict[str, torch.Tensor]]] = []
        self.pause = self.longest = 0.0
        self._memory: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, values: torch.Tensor, start: int, runs: Iterable[tuple[int, int, dict[str, torch.Tensor]]]) -> None:
        """Copy the values and slots of the block that begins at ``start``, whose lock the caller holds."""
        begun = time.perf_counter()
        self.values = self._copied("", values, 0)
        self.runs = [
            (start + first, start + last, {name: self._copied(name, slot, first) for name, slot in state.items()})
            for first, last, state in runs
        ]
        took = time.perf_counter() - begun
        self.pause, self.longest = self.pause + took, max(self.longest, took)

    def _copied(self, name: str, slot: torch.Tensor, first: int) -> torch.Tensor:
        if not slot.ndim:
            return slot.cpu().clone()
        room = self._room(name, slot.dtype, first, slot.numel())
        if slot.is_cpu:
            # With one thread and not with torch's: those would compete for cores with the threads of a push at work.
            np.copyto(room.view(torch.uint8).numpy(), slot.view(torch.uint8).numpy())
            return room
        return room.copy_(slot)

    def _room(self, name: str, dtype: torch.dtype, first: int, count: int) -> torch.Tensor:
        memory = self._memory.get((name, dtype))
        if memory is None:
            memory = self._memory[name, dtype] = torch.empty(BLOCK, dtype=dtype, device="cpu")
        return memory[first : first + count]


class BlockSlots(Protocol):
    """The slots of one block."""

    def slots(self) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        """See `BlockRule.slots`."""

    def load(self, start: int, stop: int, state: Mapping[str, torch.Tensor]) -> None:
        """See `BlockRule.load`."""

    def reset(self, start: int, stop: int) -> None:
        """See `BlockRule.reset`."""

    def adopt(self, settings: Mapping[str, Setting]) -> None:
        """See `BlockRule.adopt`."""


class StoredBlocks:
    """Values, slots and versions in blocks, each of which has a lock. Thread-safe.

    Args:
        layout: Which variables lie where.
        values: The flat values, shared or private.
        versions: A counter for each block, odd while the block is written.
        locks: A lock for each block; several blocks may share one.
        slots: The slots of each block; empty if no rule updates the values.
        found: The rule that updates them, if any; looked up once for all blocks.

    Attributes:
        is_trained: Whether the rule has run since the object was made.
    """

    def __init__(
        self,
        layout: ArenaLayout,
        values: torch.Tensor,
        versions: npt.NDArray[np.uint64],
        locks: Sequence[contextlib.AbstractContextManager[object]],
        slots: Sequence[BlockSlots],
        found: UpdateRule | None,
    ) -> None:
        self.layout = layout
        self.values = values
        self.is_trained = False
        self._versions = versions
        self._locks = locks
        self._slots = slots
        self._setting_names = frozenset(found.setting_names if found else ())
        self._declared = layout.rule.settings if layout.rule else {}
        self._least_lr = -math.inf if found and found.package else 0.0  # a rule of another package knows what it takes
        for name, value in self._declared.items():
            self._check_setting(name, value, value)

    def check_settings(self, settings: Mapping[str, Setting]) -> None:
        """Check that the rule has all of these settings, and that their values can be meant.

        Raises:
            ValueError: If it does not have one of them, or a value cannot be one of this setting.
        """
        rule = self.layout.rule.name if self.layout.rule else "none"
        if settings and not self._setting_names.issuperset(settings):
            raise ValueError(f"update rule {rule} has no setting {min(set(settings) - self._setting_names)!r}")
        for name, value in settings.items():
            declared = self._declared.get(name)
            if value != declared:
                self._check_setting(name, value, declared)

    def _check_setting(self, name: str, value: Setting, declared: Setting) -> None:
        if fault := setting_fault(name, value, declared, self._least_lr):
            raise ValueError(fault)

    def check_piece(self, piece: Range) -> None:
        """Check that a piece lies within one block.

        Raises:
            ValueError: If it does not.
        """
        start, stop = piece
        if not 0 <= start < stop <= self.layout.size or start // BLOCK != (stop - 1) // BLOCK:
            raise ValueError(f"[{start}, {stop}) is not within one block of its {self.layout.size} elements")

    def lock(self, element: int) -> contextlib.AbstractContextManager[object]:
        """Return the lock of an element's block; while a reader holds it, the block does not change."""
        return self._locks[element // BLOCK]

    def copy(self, piece: Range) -> torch.Tensor:
        """Return a copy of a piece, all of one version."""
        start, stop = piece
        with self._locks[start // BLOCK]:
            return self.values[start:stop].clone()

    # --- checkpoints

    def slot_kinds(self) -> Iterator[tuple[int, int, dict[str, SlotKind]]]:
        """Yield the present slots as runs ``(start, stop, kinds)``, in order. A slot, once made, never disappears."""
        for block, rule in enumerate(self._slots):
            with self._locks[block]:
                runs = [
                    (start, stop, {name: SlotKind.of(slot) for name, slot in state.items()})
                    for start, stop, state in rule.slots()
                ]
            for start, stop, kinds in runs:
                yield block * BLOCK + start, block * BLOCK + stop, kinds

    def copy_block(self, block: int, copy: BlockCopy) -> None:
        """Copy the values and slots of a block at one moment. Pushes to the block wait for the copy."""
        start, stop = self.layout.pieces[block]
        with self._locks[block]:
            copy.take(self.values[start:stop], start, self._slots[block].slots() if self._slots else ())

    @contextlib.contextmanager
    def filling(self, span: Range) -> Iterator[torch.Tensor]:
        """Yield flat CPU memory whose content the range has afterwards: the values themselves if they lie on the CPU.

        The blocks of the range are locked meanwhile, always in ascending order, so that two callers cannot deadlock.
        """
        start, stop = span
        values, blocks = self.values[start:stop], slice(start // BLOCK, num_blocks(stop))
        room = values if values.is_cpu else torch.empty_like(values, device="cpu")
        with contextlib.ExitStack() as locked:
            for lock in dict.fromkeys(self._locks[blocks]):  # the blocks of a table share one lock
                locked.enter_context(lock)
            self._versions[blocks] += 1
            try:
                yield room
                if room is not values:
                    values.copy_(room)
            finally:
                self._versions[blocks] += 1

    def load_slots(self, span: Range, state: dict[str, torch.Tensor]) -> None:
        """Restore the slots of a range: flat tensors as long as the range, or scalars.

        Raises:
            ValueError: If they are not the slots of this arena's rule.
        """
        if not self._slots:
            raise ValueError("no optimizer of this model updates it")
        # With the gap behind the range: a gap without slots would keep its neighbours apart forever; see `join_runs`.
        end = self.layout.gap_end(span[1])
        gap = end - span[1]
        state = {name: F.pad(slot, (0, gap)) if slot.ndim and gap else slot for name, slot in state.items()}
        for start, stop in pieces([(span[0], end)]):
            block = start // BLOCK
            part = {
                name: slot if slot.ndim == 0 else slot[start - span[0] : stop - span[0]] for name, slot in state.items()
            }
            with self._locks[block]:
                self._slots[block].load(start - block * BLOCK, stop - block * BLOCK, part)

    def reset_slots(self, span: Range) -> None:
        """Forget the slots of a range. Does nothing if no rule updates it."""
        if not self._slots:
            return
        for start, stop in pieces([(span[0], self.layout.gap_end(span[1]))]):
            block = start // BLOCK
            with self._locks[block]:
                self._slots[block].reset(start - block * BLOCK, stop - block * BLOCK)

    def adopt(self, settings: dict[str, Setting]) -> None:
        """Adopt the settings of the rule before the next push brings them.

        Raises:
            ValueError: If the rule has no such setting, or cannot adopt it.
        """
        self.check_settings(settings)
        for lock, slots in zip(self._locks, self._slots, strict=False):
            with lock:
                slots.adopt(settings)
