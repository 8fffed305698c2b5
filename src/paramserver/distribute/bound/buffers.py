"""Buffers of a model, such as BatchNorm's running statistics, bound to the memory that the lanes read and write.

Rules
    * Each replica has buffers of its own, which a step combines: summed and averaged buffers become the mean of the
      replicas' (integers: the first replica's value); of every other buffer, the first replica's value that has changed
      is taken. With the policy ``own`` each replica keeps its own, and the first replica's is the worker's.
    * In one process the memory is the store's. Otherwise the replicas' buffers are in blocks of their own, and a step
      pushes the changes since the last values came. So a step that fails loses no change, and a change that a program
      makes while a push is under way is pushed with the next step.
    * The only worker of a cluster always assigns, with any policy: sums would round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch

from paramserver.distribute.bound.arenas import Binding, BoundArena
from paramserver.distribute.bound.parameters import same_kind
from paramserver.distribute.bound.plan import Kind
from paramserver.distribute.bound.replica_tensors import kept
from paramserver.errors import ConfigError
from paramserver.layout.blocks import Range
from paramserver.memory.torch_internals import buffers_of
from paramserver.wire.messages import Part

ADVICE = (
    "a buffer keeps its shape and dtype after prepare: make it as large as it will become, or register it with "
    "persistent=False, so that it is each worker's own and in no checkpoint"
)

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The workers that share the buffers.

    Attributes:
        num_workers: Number of tasks that train; 0 if it is not known.
        is_chief: Whether this task is the chief.
    """

    num_workers: int = 1
    is_chief: bool = True


class ConstantArena(BoundArena):
    """Parameters that no step changes on the ps tasks."""

    def gather(self) -> None:
        self._homes.gather()


class LocalBufferArena(BoundArena):
    """Buffers of a store in this process, which takes the replicas' combined values with each step."""

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        plan, has_many = binding.plan, len(binding.tensors.devices) > 1
        self._is_own, self._is_fresh = plan.kind is Kind.OWN, False
        self._is_chosen = plan.kind is Kind.ASSIGNED and has_many
        self._is_mean = plan.kind in (Kind.COUNTED, Kind.AVERAGED) and has_many and self.values.is_floating_point()
        self._known = torch.zeros_like(self.values) if self._is_chosen else self.values  # the last values that came
        self._reached = torch.zeros_like(self.values) if has_many else self.values  # the replicas' combined values

    def offer_values(self) -> None:
        self._take_over()
        super().offer_values()

    def bring_home(self) -> None:
        self._take_over()
        super().bring_home()

    def gather(self) -> None:
        self._take_over()
        self._combine()

    def pulled(self) -> None:
        self.values.copy_(self._reached)  # only after the step, which may fail and be repeated
        if not self._is_own:
            self._adopt()

    def refreshed(self) -> None:
        if not self._is_own or not self._is_fresh:
            self._take_over()  # a buffer that a module has replaced would otherwise come back with the next step
            self._adopt()
        self._is_fresh = True

    def _adopt(self) -> None:
        """Copy the memory's values to all replicas."""
        super().refreshed()
        if self._is_chosen:
            self._known.copy_(self.values)

    def _take_over(self) -> None:
        """Take the values of tensors that modules have put in the place of their buffers."""
        for member in self.plan.members:
            variable = member.variable
            assert variable.module is not None  # noqa: S101  # a buffer has one
            name = variable.spec.name.rpartition(".")[2]
            buffers = buffers_of(variable.module)
            found = same_kind(variable.spec, buffers.get(name), ADVICE)
            buffers[name] = kept(variable.tensor, found)
        self._homes.gather()

    def _combine(self) -> None:
        """Begin to copy the replicas' combined values to their place."""
        with self._copies.aside():
            combined = self._combined()
            if combined is not self._reached:
                self._copies.copy(self._reached, combined)

    def _combined(self) -> torch.Tensor:
        if self._is_mean:
            return self._mean()
        return self._first_changed() if self._is_chosen else self._replica_values[0]

    def _mean(self) -> torch.Tensor:
        first, *others = self._replica_values
        mean = first
        for other in others:
            move = (other.to(first.device) - first).nan_to_num_(0, 0, 0)  # an infinite first value stays
            mean = torch.add(mean, move, alpha=1 / len(self._replica_values))
        return mean

    def _first_changed(self) -> torch.Tensor:
        first, *others = self._replica_values
        known, chosen = self._known.to(first.device), first
        for other in (each.to(first.device) for each in others):
            for start, stop in self._changed(other, known):
                if not _differing(chosen[start:stop], known[start:stop]).any():
                    chosen = chosen.clone() if chosen is first else chosen
                    chosen[start:stop] = other[start:stop]
        return chosen

    def _changed(self, values: torch.Tensor, before: torch.Tensor) -> Sequence[Range]:
        """Return the ranges of the buffers whose values have changed."""
        differing = _differing(values, before)
        if not differing.any():
            return []
        return [(start, stop) for start, stop in self.plan.layout.ranges if differing[start:stop].any()]


class BufferArena(LocalBufferArena):
    """Buffers of ps tasks in other processes.

    Args:
        binding: As for `BoundArena`.
        sharing: The workers that share the buffers.
    """

    def __init__(self, binding: Binding, sharing: Sharing) -> None:
        super().__init__(replace(binding, is_apart=True))
        plan = binding.plan
        if plan.kind is Kind.AVERAGED and not sharing.num_workers:
            names = ", ".join(each.name for each in plan.layout.variables)
            raise ConfigError(
                f"prepare: buffers with the policy 'mean' ({names}) need the number of workers, which the operator of "
                "this cluster does not tell; choose 'sum', 'last' or 'own'"
            )
        self._adds = plan.kind in (Kind.COUNTED, Kind.AVERAGED) and sharing.num_workers != 1
        self._weight = 1 / sharing.num_workers if plan.kind is Kind.AVERAGED else 1.0
        self._is_only_one = sharing.num_workers == 1
        self._pushes = sharing.is_chief or not self._is_own
        self._reached = torch.zeros_like(self.values)
        self._known = torch.zeros_like(self.values)
        # A replica's values, and the values that a step has last pushed. One copy changes both, so that an interrupt
        # leaves both old or both new.
        self._pairs: list[torch.Tensor] = []

    def copied_memory(self) -> list[torch.Tensor]:
        return [self.values, self.gradients, self._reached]

    def gather(self) -> None:
        self._take_over()
        self._combine()

    def parts(self) -> list[Part]:
        with self._copies.aside():
            for pair in self._pairs:
                self._copies.copy(pair[1], self._reached)
        moved = _differing(self._reached, self._known)
        if not self._pushes or not moved.any():
            return []
        return self._added(moved) if self._adds else self._assigned()

    def meanwhile(self) -> None:
        if len(self._pairs) > 1 and not self._is_own:
            with self._copies.aside():
                for pair in self._pairs:
                    self._copies.copy(pair[0], pair[1])

    def pulled(self) -> None:
        """Combine fresh values with the changes that this worker has made since it pushed."""
        if not self._is_own:
            self._take_over()
            with self._copies.aside():
                for pair in self._pairs:
                    (self._shift if self._adds else self._replace)(pair)
            self._homes.scatter()
        self._known.copy_(self.values)

    def refreshed(self) -> None:
        if self._pushes and _differing(self.values, self._known).any():
            self._is_fresh = False  # the values come from a checkpoint: the chief takes them even for ``own``
        super().refreshed()
        self._known.copy_(self.values)

    def _values_for(self, replica: int, device: torch.device) -> torch.Tensor:
        self._pairs.append(torch.empty(2, len(self.values), dtype=self.values.dtype, device=device))
        return self._pairs[-1][0]

    def _added(self, moved: torch.Tensor) -> list[Part]:
        torch.sub(self._reached, self._known, out=self.gradients)
        self.gradients.masked_fill_(moved.logical_not_(), 0)  # infinity minus itself would not be zero
        if self._weight != 1:
            self.gradients.mul_(self._weight)
        if self.gradients.isfinite().all():
            return [Part(self.plan.index, "add")]
        return self._parts_of_infinite_moves()

    def _assigned(self) -> list[Part]:
        self.gradients.copy_(self._reached)
        if self._is_only_one or self._is_own:
            return [Part(self.plan.index, "assign")]
        return [Part(self.plan.index, "assign", tuple(self._changed(self._reached, self._known)))]

    def _shift(self, pair: torch.Tensor) -> None:
        """Add other workers' changes; the sum must not be rounded where this worker has changed nothing."""
        block, pushed = pair
        fresh = torch.empty_like(block)
        self._copies.copy(fresh, self.values)
        shifted = block + (fresh - pushed).masked_fill_(pushed == fresh, 0)  # infinity minus itself is no move
        is_fresh = (block == pushed) | shifted.isfinite().logical_not()
        pair.copy_(torch.stack([torch.where(is_fresh, fresh, shifted), fresh]))

    def _replace(self, pair: torch.Tensor) -> None:
        """Take the ps tasks' values of the buffers that this worker has not changed since it pushed."""
        block, pushed = pair
        fresh = torch.empty_like(block)
        self._copies.copy(fresh, self.values)
        values = fresh.clone()
        for start, stop in self._changed(block, pushed):
            values[start:stop] = block[start:stop]
        pair.copy_(torch.stack([values, fresh]))

    def _parts_of_infinite_moves(self) -> list[Part]:
        index, layout = self.plan.index, self.plan.layout
        views = layout.views(self.gradients)
        finite = [bool(view.isfinite().all()) for view in views]
        for view, value, is_finite in zip(views, layout.views(self._reached), finite, strict=True):
            if not is_finite:
                view.copy_(value)
        assigned = compress(layout.ranges, (not is_finite for is_finite in finite))
        return [
            Part(index, "add", _not_empty(compress(layout.ranges, finite))),
            Part(index, "assign", _not_empty(assigned)),
        ]


def _not_empty(ranges: Iterable[Range]) -> tuple[Range, ...]:
    return tuple((start, stop) for start, stop in ranges if start < stop)


def _differing(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return where the bits of two flat tensors differ; a NaN equals itself."""
    integers = _SAME_SIZE[one.element_size()]
    return one.view(integers) != other.view(integers)
