"""An update rule at work on one block: torch.optim's own step over flat slices, each with its own state."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paramserver.layout.rules import Rule, UpdateRule, find_rule
from paramserver.layout.settings import Setting
from paramserver.store.optimizers import build, kernel


class _Run(NamedTuple):
    """Elements `[start, stop)` of a block that have had the same updates; `parameter` is a view of them."""

    start: int
    stop: int
    parameter: nn.Parameter


class BlockRule:
    """An update rule over one block of values, with its slots.

    Rules are elementwise, so one update over a flat slice equals an update of each variable in it. Elements without a
    gradient in a step keep their values, slots and step count, because torch.optim skips ``grad is None``. Elements
    that have had different updates therefore need different scalar state: the block is a sequence of *runs*, one at
    first, and a gradient for a part of a run splits it.

    float32 and float64 use torch's fused kernels where these are faster; they differ from the unfused ones by rounding
    only. Half precision is never fused: torch itself rounds it differently at the end of a tensor, so it equals
    torch.optim bit for bit only where variables fill whole vector registers.

    Not thread-safe: the caller holds the block's lock.

    Args:
        rule: The rule and its first settings.
        values: `[size]`, contiguous; updated in place, never replaced.
        found: What `find_rule` returns for the rule, from a caller that has looked it up already.

    Raises:
        UnsupportedOptimizerError: If there is no such rule.
        ConfigError: If the rule does not have a setting, or torch.optim refuses a value.

    Example:
        >>> values, target = torch.zeros(4), torch.arange(4.0)
        >>> rule = BlockRule(Rule("SGD", {"lr": 0.1}), values)
        >>> for _ in range(3):
        ...     print(f"loss {((values - target) ** 2).sum():.2f}")
        ...     rule.apply(0, 4, 2 * (values - target), {"lr": 0.1})
        loss 14.00
        loss 8.96
        loss 5.73
    """

    def __init__(self, rule: Rule, values: Tensor, found: UpdateRule | None = None) -> None:
        if values.dim() != 1 or not values.is_contiguous():
            raise ValueError(f"values of a block must be flat and contiguous, got {tuple(values.shape)}")
        found = found or find_rule(rule)
        self._class = found.optimizer
        self._names = frozenset(found.setting_names)
        self._values = values
        self._size = len(values)
        self._settings = dict(rule.settings)
        self._runs = [self._run(0, len(values))]
        self._starts = [0]
        self._optimizer = build(self._class, rule.settings, self._runs[0].parameter)
        # The decorated step spends 8 to 10 us on profiler ranges, hooks and the autograd mode: as long as SGD takes to
        # update 100,000 elements. None of these has a use here.
        self._step = inspect.unwrap(self._class.step)
        self._kernel = kernel(self._class, self._optimizer.param_groups[0])

    def __repr__(self) -> str:
        return f"<BlockRule {self._class.__name__} of {self._size} in {len(self._runs)} runs>"

    def apply(self, start: int, stop: int, gradient: Tensor, settings: Mapping[str, Setting]) -> None:
        """Update elements `[start, stop)` by their gradient `[stop - start]`, which is not kept.

        Args:
            start: First element, within the block.
            stop: One after the last element.
            gradient: Of the dtype of the values; only read.
            settings: The settings of the param group for this step. A setting that is left out stays as it was.

        Raises:
            ValueError: If the range is not within the block, the gradient does not fit, or a setting is unknown.
        """
        if gradient.shape != (stop - start,) or gradient.dtype is not self._values.dtype:
            raise ValueError(
                f"a gradient for [{start}, {stop}) must have shape ({stop - start},) and "
                f"{self._values.dtype}, got {tuple(gradient.shape)} and {gradient.dtype}"
            )
        if settings != self._settings:
            self._adopt(settings)
        runs = self._whole_runs(start, stop)
        if len(runs) == 1:
            self._update(runs, [gradient])
            return
        # Updated separately, because torch's fused SGD takes its first step for all its parameters or for none.
        fresh = [run for run in runs if not self._optimizer.state.get(run.parameter)]
        known = [run for run in runs if self._optimizer.state.get(run.parameter)]
        for part in filter(None, (fresh, known)):
            self._update(part, [gradient[run.start - start : run.stop - start] for run in part])

    def lacks(self, slot: str) -> bool:
        """Return whether some elements have been updated without this slot."""
        return any(slot not in state for state in self._optimizer.state.values() if state)

    def slots(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Yield `(start, stop, state)` of each run that has state, in order, for a checkpoint.

        Elementwise state has shape `[stop - start]`, scalar state (such as `step`) is 0-dimensional; the names are
        torch.optim's. The tensors are the live ones: copy them before releasing the lock of the block.
        """
        for run in self._runs:
            state = self._optimizer.state.get(run.parameter)
            if state:
                yield run.start, run.stop, dict(state)

    def load(self, start: int, stop: int, state: Mapping[str, Tensor]) -> None:
        """Restore the state of elements `[start, stop)`, as `slots` yields it, or a part of it. Copies the tensors.

        After loading many small ranges, call `join`.

        Raises:
            ValueError: If the range is not within the block, or a slot is unknown to the rule with its settings, is
                missing, or has another shape or dtype; the message names the slot. No state changes then.
        """
        expected = self._expected_slots()
        _check_slots(self._class.__name__, start, stop, expected, state)
        first, last = self._cut(start, stop)
        for run in self._runs[first:last]:
            self._optimizer.state.pop(run.parameter, None)
        run = self._run(start, stop)
        self._optimizer.state[run.parameter] = {
            name: slot.to(expected[name].device, expected[name].dtype, copy=True) for name, slot in state.items()
        }
        self._replace(first, last, [run])

    def reset(self, start: int, stop: int) -> None:
        """Forget the state of elements `[start, stop)`, which begin again as if they had had no update."""
        if not self._optimizer.state:
            return
        first, last = self._cut(start, stop)
        for run in self._runs[first:last]:
            self._optimizer.state.pop(run.parameter, None)
            # Adagrad makes state on construction, before its first update.
            anew = build(self._class, self._group_settings(), run.parameter)
            if state := anew.state.get(run.parameter):
                self._optimizer.state[run.parameter] = state

    def adopt(self, settings: Mapping[str, Setting]) -> None:
        """Adopt settings before the next update brings them, such as those that loaded state was made with.

        Raises:
            ValueError: If a setting is unknown to the rule.
        """
        if settings != self._settings:
            self._adopt(settings)

    def join(self) -> None:
        """Join neighbouring runs whose scalar state is equal, so that fewer updates serve them.

        This changes no result. `apply` never joins runs, because joining copies slots; call this once after loading.
        """
        first = 0
        while first < len(self._runs):
            last = first + 1
            while last < len(self._runs) and self._alike(self._runs[first], self._runs[last]):
                last += 1
            if last - first > 1:
                self._merge(first, last)
            first += 1

    @property
    def slot_bytes(self) -> int:
        """Size of the state beside the values, in bytes."""
        return sum(slot.nbytes for state in self._optimizer.state.values() for slot in state.values())

    def _adopt(self, settings: Mapping[str, Setting]) -> None:
        """Adopt settings that differ from those of the step before."""
        unknown = settings.keys() - self._names
        if unknown:
            # A peer must not reach the group's other entries, such as its parameters.
            raise ValueError(f"update rule {self._class.__name__} has no setting {min(unknown)!r}")
        group = self._optimizer.param_groups[0]
        self._kernel = kernel(self._class, {**group, **settings})  # first, because it may raise
        group.update(settings)
        self._settings = dict(settings)

    def _update(self, runs: list[_Run], gradients: list[Tensor]) -> None:
        """Run torch's step over these runs only."""
        parameters = [run.parameter for run in runs]
        if self._kernel and self._kernel(parameters, gradients, self._optimizer.state):
            return
        self._optimizer.param_groups[0]["params"] = parameters
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        try:
            self._step(self._optimizer)  # without `no_grad`, which takes microseconds: nothing here requires a gradient
        finally:
            for parameter in parameters:
                parameter.grad = None  # the memory belongs to the lane, which writes the next gradient there

    def _whole_runs(self, start: int, stop: int) -> list[_Run]:
        """Return the runs that make up `[start, stop)`."""
        if len(self._runs) == 1 and (start, stop) == (0, self._size):
            return self._runs
        first, last = self._cut(start, stop)
        return self._runs[first:last]

    def _cut(self, start: int, stop: int) -> tuple[int, int]:
        """Split runs so that whole runs make up `[start, stop)`, and return their range of indices."""
        if not 0 <= start < stop <= self._size:
            raise ValueError(f"[{start}, {stop}) is not a range of a block of {self._size}")
        first = self._index(start)
        return first, self._index(stop)

    def _index(self, at: int) -> int:
        """Return the index of the run that begins at `at`; split a run if none begins there."""
        index = bisect.bisect_left(self._starts, at)
        if at < self._size and (index == len(self._starts) or self._starts[index] != at):
            self._split(index - 1, at)
        return index

    def _split(self, index: int, at: int) -> None:
        """Split a run at element `at`: elementwise state becomes views, scalar state is copied."""
        run = self._runs[index]
        halves = [self._run(run.start, at), self._run(at, run.stop)]
        state = self._optimizer.state.pop(run.parameter, None)
        for half in halves if state else ():
            self._optimizer.state[half.parameter] = {
                name: slot[half.start - run.start : half.stop - run.start] if slot.dim() else slot.clone()
                for name, slot in state.items()
            }
        self._replace(index, index + 1, halves)

    def _alike(self, one: _Run, other: _Run) -> bool:
        """Return whether two runs have the same slots, with equal scalars."""
        a, b = (self._optimizer.state.get(run.parameter, {}) for run in (one, other))
        return a.keys() == b.keys() and all(slot.dim() or torch.equal(slot, b[name]) for name, slot in a.items())

    def _merge(self, first: int, last: int) -> None:
        """Make one run of runs that are alike."""
        runs = self._runs[first:last]
        whole = self._run(runs[0].start, runs[-1].stop)
        states = [self._optimizer.state.pop(run.parameter, {}) for run in runs]
        if states[0]:
            # Slot by slot, so that at most one of them exists twice.
            self._optimizer.state[whole.parameter] = {
                name: torch.cat(parts) if parts[0].dim() else parts[0]
                for name in list(states[0])
                if (parts := [state.pop(name) for state in states])
            }
        self._replace(first, last, [whole])

    def _replace(self, first: int, last: int, runs: list[_Run]) -> None:
        self._runs[first:last] = runs
        self._starts[first:last] = [run.start for run in runs]

    def _run(self, start: int, stop: int) -> _Run:
        return _Run(start, stop, nn.Parameter(self._values[start:stop], requires_grad=False))

    def _group_settings(self) -> dict[str, Setting]:
        group = self._optimizer.param_groups[0]
        return {name: group[name] for name in self._names}

    def _expected_slots(self) -> dict[str, Tensor]:
        """Return the slots of the rule with its present settings, found by a step of one element."""
        parameter = nn.Parameter(torch.zeros_like(self._values[:1]), requires_grad=False)
        parameter.grad = torch.zeros_like(parameter)
        optimizer = build(self._class, self._group_settings(), parameter)
        self._step(optimizer)
        return dict(optimizer.state.get(parameter, {}))


def _check_slots(rule: str, start: int, stop: int, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse state for `[start, stop)` that does not match the expected slots, naming the slot."""
    for name in [*state, *expected]:
        where = f"cannot load [{start}, {stop}) of {rule}: slot {name!r}"
        if name not in expected:
            raise ValueError(f"{where} is unknown; this rule has {', '.join(expected) or 'none'}")
        if name not in state:
            raise ValueError(f"{where} is missing; got {', '.join(state) or 'none'}")
        slot, like = state[name], expected[name]
        shape = (stop - start,) if like.dim() else ()
        if slot.shape != shape:
            raise ValueError(f"{where} must have shape {shape}, got {tuple(slot.shape)}")
        if shape and slot.dtype is not like.dtype:
            raise ValueError(f"{where} must be {like.dtype}, got {slot.dtype}")
