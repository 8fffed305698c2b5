"""Buffers of a model, such as BatchNorm's running statistics, bound to the memory that the lanes read and write.

Rules
    * Each replica has buffers of its own. With a step, they become the mean of the replicas' (integers: the first
      replica's), as for a moving average; boolean ones stay as they are.
    * In one process the memory is the store's. Otherwise the replicas' buffers lie in blocks of their own, and a step
      pushes what they have changed by since the last values came. So a step that fails loses no change, and what a
      program changes while a push is under way is pushed with the next one.
"""

from __future__ import annotations

from itertools import compress

import torch

from paramserver.distribute.bound_arena import BoundArena
from paramserver.distribute.bound_parameter import same_kind
from paramserver.distribute.device_copies import DeviceCopies
from paramserver.distribute.replica_tensors import ReplicaTensors, kept
from paramserver.distribute.variables import ArenaPlan
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part


class ConstantArena(BoundArena):
    """Parameters and buffers that no step changes on the ps tasks."""

    def gather(self) -> None:
        """Find what modules have put in the place of their buffers."""
        for member in self.plan.members:
            variable = member.variable
            if variable.module is not None:
                name = variable.spec.name.rpartition(".")[2]
                found = same_kind(variable.spec, variable.module._buffers[name])
                variable.module._buffers[name] = kept(variable.tensor, found)
        self._homes.gather()


class LocalCountedArena(ConstantArena):
    """Buffers of a store in this process, which the replicas' become with each step."""

    def gather(self) -> None:
        super().gather()
        self._average(self.values)

    def _average(self, out: torch.Tensor) -> None:
        """What all replicas together have come to, on its way to ``out``."""
        with self._copies.aside():
            mean = self._mean()
            if mean is not out:
                self._copies.copy(out, mean)

    def _mean(self) -> torch.Tensor:
        first, *others = self._replica_values
        mean = first
        for other in others if first.is_floating_point() else []:
            move = (other.to(first.device) - first).nan_to_num_(0, 0, 0)  # infinities stay
            mean = torch.add(mean, move, alpha=1 / len(self._replica_values))
        return mean


class CountedArena(LocalCountedArena):
    """Buffers that are changed by adding.

    Args:
        plan: As for `BoundArena`.
        memory: As for `BoundArena`.
        tensors: As for `BoundArena`.
        copies: As for `BoundArena`.
    """

    def __init__(
        self, plan: ArenaPlan, memory: WorkerMemory, tensors: ReplicaTensors, copies: DeviceCopies | None = None
    ) -> None:
        super().__init__(plan, memory, tensors, copies, is_apart=True)
        self._reached = torch.zeros_like(self.values)
        self._known = torch.zeros_like(self.values)  # the ps tasks' values, as they came last
        # A replica's values, and those of them that a step has pushed last. They change by one copy, so that an
        # interrupt finds both as they were, or both new.
        self._pairs: list[torch.Tensor] = []

    def copied_memory(self) -> list[torch.Tensor]:
        return [self.values, self.gradients, self._reached]

    def gather(self) -> None:
        ConstantArena.gather(self)
        self._average(self._reached)

    def parts(self) -> list[Part]:
        with self._copies.aside():
            for pair in self._pairs:
                self._copies.copy(pair[1], self._reached)
        moved = self._reached != self._known
        if not moved.any():
            return []
        torch.sub(self._reached, self._known, out=self.gradients)
        self.gradients.masked_fill_(moved.logical_not_(), 0)  # infinity less itself would not be zero
        if self.gradients.isfinite().all():
            return [Part(self.plan.index, "add")]
        return self._parts_of_infinite_moves()

    def meanwhile(self) -> None:
        if len(self._pairs) > 1:
            with self._copies.aside():
                for pair in self._pairs:
                    self._copies.copy(pair[0], pair[1])

    def pulled(self) -> None:
        """What others have changed is added to what this worker has changed since it pushed."""
        with self._copies.aside():
            for pair in self._pairs:
                self._shift(pair)
        self._homes.scatter()
        self._known.copy_(self.values)

    def refreshed(self) -> None:
        super().refreshed()
        self._known.copy_(self.values)

    def _values_for(self, replica: int, device: torch.device) -> torch.Tensor:
        self._pairs.append(torch.empty(2, len(self.values), dtype=self.values.dtype, device=device))
        return self._pairs[-1][0]

    def _shift(self, pair: torch.Tensor) -> None:
        """Add what others have changed; the sum must not be rounded where this worker has changed nothing."""
        block, pushed = pair
        fresh = torch.empty_like(block)
        self._copies.copy(fresh, self.values)
        shifted = block + (fresh - pushed).masked_fill_(pushed == fresh, 0)  # infinity less itself is no move
        is_fresh = (block == pushed) | shifted.isfinite().logical_not()
        pair.copy_(torch.stack([torch.where(is_fresh, fresh, shifted), fresh]))

    def _parts_of_infinite_moves(self) -> list[Part]:
        index, layout = self.plan.index, self.plan.layout
        views = layout.views(self.gradients)
        finite = [bool(view.isfinite().all()) for view in views]
        for view, value, is_finite in zip(views, layout.views(self._reached), finite, strict=True):
            if not is_finite:
                view.copy_(value)
        assigned = compress(layout.ranges, (not is_finite for is_finite in finite))
        return [
            Part(index, "add", tuple(compress(layout.ranges, finite))),
            Part(index, "assign", tuple(assigned)),
        ]
