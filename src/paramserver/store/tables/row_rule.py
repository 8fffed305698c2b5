"""An update rule at work on the rows of a table: torch.optim's own step over the rows that have a gradient.

Rules
    * The rows and their slots are gathered, torch.optim makes its step on them as on a small parameter, and they are
      written back. As torch.optim leaves rows without a gradient alone, this equals its step on the whole table.
    * For SGD and Adagrad on a large table, a compiled loop, if there is one, does the same in the table's own memory.
    * Slots are made with the first update, and take memory only for the parts of them that were written.
    * Counters belong to the table, not to a row, as in torch.optim: ``step`` counts updates of the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from paramserver.errors import UnsupportedOptimizerError
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import Rule, UpdateRule, find_rule, row_fault
from paramserver.layout.settings import Setting
from paramserver.memory import huge_pages
from paramserver.memory.rows import Ids, Rows, flat
from paramserver.store.optimizers import build


@dataclass(frozen=True)
class RowUpdate:
    """A computed update of rows, which only has to be written to the values.

    Attributes:
        write: Function that writes the rows.
        arguments: The arguments of ``write``.
    """

    write: Callable[..., None]
    arguments: tuple[Any, ...]

    def apply(self) -> None:
        """Write the rows to the values. Called once."""
        self.write(*self.arguments)


class RowRule:
    """An update rule over the rows of a table, with its slots.

    Not thread-safe: the caller holds the table's lock.

    Args:
        rule: The rule and its first settings.
        values: ``[rows, width]``.
        found: What `find_rule` returns for the rule, from a caller that has looked it up already.

    Attributes:
        rows: The values.

    Raises:
        UnsupportedOptimizerError: If there is no such rule for rows.
        ConfigError: If the rule does not have a setting, or torch.optim refuses a value.

    Example:
        >>> import numpy as np
        >>> table = torch.zeros(4, 2)
        >>> rule = RowRule(Rule("Adagrad", {"lr": 0.5}), table)
        >>> ids = np.array([1, 3])
        >>> rule.update(ids, torch.ones(2, 2), {"lr": 0.5}).apply()
        >>> table.tolist()
        [[0.0, 0.0], [-0.5, -0.5], [0.0, 0.0], [-0.5, -0.5]]
    """

    def __init__(self, rule: Rule, values: Tensor, found: UpdateRule | None = None) -> None:
        found = found or find_rule(rule)
        if found.row_slots is None:
            raise UnsupportedOptimizerError(f"the update rule {rule.name!r} has no form for rows of tables", rule.name)
        self._class = found.optimizer
        self.rows = Rows(values)
        self._settings = dict(rule.settings)
        self._slots: dict[str, Rows] = {}
        self._steps = 0
        self._first_slots = dict(found.row_slots(rule.settings))
        self._takes_sparse = found.takes_sparse
        self._optimizer = build(self._class, rule.settings, nn.Parameter(values[:0], requires_grad=False))
        self._run = inspect.unwrap(self._class.step)  # without hooks and the profiler, as in `block_rule`

    def __repr__(self) -> str:
        return f"<RowRule {self._class.__name__} of {len(self.rows.table)} rows>"

    @property
    def slot_bytes(self) -> int:
        """Size of the state beside the values, in bytes."""
        return sum(slot.table.nbytes for slot in self._slots.values())

    def update(self, ids: Ids, gradient: Tensor, settings: Mapping[str, Setting]) -> RowUpdate:
        """Compute a step on rows and update their slots. The values change when the result is applied, at once.

        Args:
            ids: ``[rows]``, ascending and unique.
            gradient: ``[rows, width]``, of the dtype of the values; only read.
            settings: The settings of the param group for this step, checked by the caller. A setting that is left out
                stays as it was.
        """
        self.adopt(settings)
        self._make_slots()
        if (loop := self._loop(ids, gradient)) is not None:
            return loop
        rows = self.rows.take(ids)
        gathered = {name: slot.take(ids) for name, slot in self._slots.items()}
        if gathered:
            step = self._steps if self._takes_sparse else torch.tensor(float(self._steps))
            self._optimizer.state[rows] = {**gathered, "step": step}
        self._optimizer.param_groups[0]["params"] = [rows]
        try:
            self._run_step(rows, gradient)
        finally:
            self._optimizer.state.clear()
            self._optimizer.param_groups[0]["params"] = []
            rows.grad = None  # the gradient's memory belongs to the lane, as in `block_rule`
        self._steps += 1  # after the step, because a step that torch refuses changes nothing
        for name, slot in self._slots.items():
            slot.put(ids, gathered[name])
        return RowUpdate(self.rows.put, (ids, rows))

    def adopt(self, settings: Mapping[str, Setting]) -> None:
        """Adopt settings, which the caller has checked."""
        if settings != self._settings:
            self._optimizer.param_groups[0].update(settings)
            self._settings = dict(settings)

    def reset(self) -> None:
        """Forget the slots and the count of updates: all rows begin again, as if they had had no update."""
        self._slots, self._steps = {}, 0

    def _loop(self, ids: Ids, gradient: Tensor) -> RowUpdate | None:
        """Return an update by a compiled loop on the table's own memory; None if there is no such loop."""
        loops, group = self.rows.loops, self._optimizer.param_groups[0]
        if loops is None or group["maximize"]:
            return None
        elements, lr = flat(gradient), float(group["lr"])
        rows, number = (ids.view(np.uint64), elements, np.uint64(self.rows.table.shape[1])), elements.dtype.type
        if self._class is optim.SGD:
            return RowUpdate(loops.sgd, (self.rows.elements, *rows, number(lr)))
        if self._class is not optim.Adagrad:
            return None
        lr, eps = lr / (1 + self._steps * group["lr_decay"]), float(group["eps"])
        self._steps += 1
        sums = self._slots["sum"].elements
        return RowUpdate(loops.adagrad, (self.rows.elements, sums, *rows, number(lr), number(eps)))

    def _run_step(self, rows: Tensor, gradient: Tensor) -> None:
        if not self._takes_sparse:
            rows.grad = gradient
            self._run(self._optimizer)  # without `no_grad`, as in `block_rule`
            return
        rows.grad = _sparse(gradient)
        # torch warns of sparse tensors without an explicit choice about checking them; its own steps make some.
        with torch.no_grad(), torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
            self._run(self._optimizer)

    def block(self, index: int) -> RowRuleBlock:
        """Return one block of the slots, for checkpoints."""
        return RowRuleBlock(self, index * BLOCK)

    def state(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return the slots of elements ``[start, stop)`` of the flat table, as views; empty before the first update."""
        if not self._slots:
            return {}
        slots = {name: slot.table.view(-1)[start:stop] for name, slot in self._slots.items()}
        return slots | {"step": torch.tensor(float(self._steps))}

    def load(self, start: int, stop: int, state: Mapping[str, Tensor]) -> None:
        """Restore the slots of elements ``[start, stop)`` of the flat table. Copies the tensors.

        Raises:
            ValueError: If they are not the slots of this rule.
        """
        expected = {*self._first_slots, "step"} if self._first_slots else set[str]()
        for name in sorted(expected ^ state.keys()):
            what = "is missing" if name in expected else "is unknown"
            raise ValueError(f"cannot load rows of {self._class.__name__}: slot {name!r} {what}")
        for name, slot in state.items():
            shape = (stop - start,) if name in self._first_slots else ()
            if slot.shape != shape or (shape and slot.dtype is not self.rows.table.dtype):
                got = f"{slot.dtype} and {tuple(slot.shape)}"
                raise ValueError(
                    f"cannot load rows of {self._class.__name__}: slot {name!r} must be {self.rows.table.dtype} and "
                    f"{shape}, got {got}"
                )
        self._make_slots()
        for name in self._first_slots:
            self._slots[name].table.view(-1)[start:stop] = state[name]
        if "step" in state:
            self._steps = int(state["step"])

    def _make_slots(self) -> None:
        for name, first in self._first_slots.items():
            if name not in self._slots:
                made = huge_pages.zeros(self.rows.table.shape, self.rows.table.dtype, self.rows.table.device)
                self._slots[name] = Rows(made.fill_(first) if first else made)


class RowRuleBlock:
    """The slots of one block of a table, with the interface of a `BlockRule`."""

    def __init__(self, rule: RowRule, first: int) -> None:
        self._rule = rule
        self._first = first

    def slots(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Yield ``(start, stop, state)``; see `BlockRule.slots`."""
        size = min(BLOCK, self._rule.rows.table.numel() - self._first)
        if state := self._rule.state(self._first, self._first + size):
            yield 0, size, state

    def load(self, start: int, stop: int, state: Mapping[str, Tensor]) -> None:
        """See `BlockRule.load`."""
        self._rule.load(self._first + start, self._first + stop, state)

    def reset(self, start: int, stop: int) -> None:
        """Forget the slots of the whole table, which can only be reset together."""
        self._rule.reset()

    def adopt(self, settings: Mapping[str, Setting]) -> None:
        """See `BlockRule.adopt`.

        Raises:
            ValueError: If a setting would change rows that have no gradient.
        """
        if fault := row_fault(settings):
            raise ValueError(fault)
        self._rule.adopt(settings)


def _sparse(gradient: Tensor) -> Tensor:
    ids = torch.arange(len(gradient), device=gradient.device)[None]
    return torch.sparse_coo_tensor(ids, gradient, gradient.shape, is_coalesced=True, check_invariants=False)
