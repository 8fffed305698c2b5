"""One arena of a model: its tensors on every replica, bound to the memory that the lanes read and write.

Rules
    * *Home* is the device of the memory. A replica that computes there uses the memory of the values itself; one
      elsewhere has a flat block of its own, which is copied as a whole. So has every replica of a pipelined model: the
      memory is in the lanes' hands while it computes.
    * A single replica at home has its gradients in the memory that is pushed. Otherwise each has a flat block of
      gradients where it computes, which no step changes, so that gradients can be kept over steps; they are added up
      on the first one's device, block by block, into the memory that is pushed.
    * `gather` may return while copies are under way; when they are done, `parts` tells what to push. How copies are
      made is `DeviceCopies`' part.
    * A gradient that some replica lacks counts as zero; one that all lack is not pushed.
    * Each replica has buffers of its own. With a step, they become the mean of the replicas' (integers: the first
      replica's), as for a moving average; boolean ones stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress

import torch

from paramserver.arena import ALIGNMENT, merge, pieces
from paramserver.distribute import bound_parameter
from paramserver.distribute.bound_parameter import BoundParameter, BoundParameters, same_kind
from paramserver.distribute.device_copies import DeviceCopies, HostCopies
from paramserver.distribute.direct_gradients import GradientPlace
from paramserver.distribute.replica_tensors import ReplicaTensors, kept
from paramserver.distribute.variables import ArenaPlan, Kind
from paramserver.rules import GroupSettings, rule_class, setting_names
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part


class BoundArena:
    """The tensors of one arena, bound to its memory. As it is: values that no step changes.

    Args:
        plan: What lies in the arena.
        memory: The memory of the ps that holds it.
        tensors: The replicas' tensors.
        copies: How blocks and memory are copied; by default as host memory is.
        is_apart: Whether no replica may use the memory itself.
    """

    def __init__(
        self,
        plan: ArenaPlan,
        memory: WorkerMemory,
        tensors: ReplicaTensors,
        copies: DeviceCopies | None = None,
        *,
        is_apart: bool = False,
    ) -> None:
        self.plan = plan
        self.values = memory.values[plan.index]
        self.gradients = memory.gradients[plan.index]
        self.is_direct = memory.direct
        self._tensors = tensors
        self._copies = copies or HostCopies()
        self._is_apart = is_apart
        self._home = self.values.device
        self._replica_values: list[torch.Tensor] = []
        self._blocks: list[torch.Tensor] = []

    def copied_memory(self) -> list[torch.Tensor]:
        """The memory of the lanes that steps copy to blocks and back."""
        return []

    def offer_values(self) -> None:
        """Lay the tensors' present values into the gradient memory, to be assigned."""
        for member, view in zip(self.plan.members, self.plan.layout.views(self.gradients), strict=True):
            tensor = member.variable.tensor.detach()
            view.copy_(tensor if member.rows is None else tensor[slice(*member.rows)])

    def bind(self) -> None:
        """From now on the tensors' values are the value memory, or blocks that are copied from it."""
        for replica, device in enumerate(self._tensors.devices):
            block = self._values_for(replica, device)
            self._replica_values.append(block)
            if block is not self.values:
                self._blocks.append(block)
                self._copies.use(block, device)
            self._bind_replica(replica, block)

    def gather(self) -> None:
        """What a step pushes begins to come to the memory that is pushed."""
        for member in self.plan.members:
            variable = member.variable
            if variable.module is not None:
                name = variable.spec.name.rpartition(".")[2]
                found = same_kind(variable.spec, variable.module._buffers[name])
                variable.module._buffers[name] = kept(variable.tensor, found)

    def parts(self) -> list[Part]:
        """What a step pushes of this arena. It has been gathered, and all copies are done."""
        return []

    def meanwhile(self) -> None:
        """What a step has to do before values come, and need not do before it pushes."""

    def pulled(self) -> None:
        """The value memory is fresh, by a step."""
        self.refreshed()

    def refreshed(self) -> None:
        """The value memory is fresh, and all that counts."""
        if self._blocks:
            with self._copies.aside():
                for block in self._blocks:
                    self._copies.copy(block, self.values)

    def _values_for(self, replica: int, device: torch.device) -> torch.Tensor:
        holds_buffers = any(member.variable.module is not None for member in self.plan.members)
        is_home = device == self._home and (replica == 0 or not holds_buffers)
        return self.values if is_home and not self._is_apart else torch.empty_like(self.values, device=device)

    def _bind_replica(self, replica: int, block: torch.Tensor) -> None:
        for member, view in zip(self.plan.members, self.plan.layout.views(block), strict=True):
            self._tensors.of(member.variable.tensor)[replica].data = view


class TrainedArena(BoundArena):
    """Parameters of one optimizer group.

    Args:
        plan: As for `BoundArena`.
        memory: As for `BoundArena`.
        tensors: As for `BoundArena`.
        group: The param group; read for every push.
        copies: As for `BoundArena`.
        mean: Whether the replicas' gradients are averaged; else they are added up.
        is_apart: As for `BoundArena`.
    """

    def __init__(
        self,
        plan: ArenaPlan,
        memory: WorkerMemory,
        tensors: ReplicaTensors,
        group: dict[str, object],
        copies: DeviceCopies | None = None,
        *,
        mean: bool,
        is_apart: bool = False,
    ) -> None:
        super().__init__(plan, memory, tensors, copies, is_apart=is_apart)
        assert plan.layout.rule is not None  # noqa: S101  # a group has a rule
        self._settings = GroupSettings(group, setting_names(rule_class(plan.layout.rule)))
        self._gap = ALIGNMENT // plan.layout.itemsize - 1
        self._weight = 1 / len(tensors.devices) if mean else 1.0
        self._replica_gradients: list[torch.Tensor] = []
        self._parameters: list[BoundParameters] = []
        self._copied: list[BoundParameter] = []
        self._pushed: list[Part] = []
        self._moving: list[list[torch.Tensor]] = []

    def copied_memory(self) -> list[torch.Tensor]:
        return [self.values, self.gradients] if self.plan.kind is Kind.TRAINED else []

    def gradient_places(self) -> Iterator[GradientPlace]:
        """Where each whole parameter's gradient belongs, on the first replica."""
        for member, view in zip(self.plan.members, self.plan.layout.views(self._replica_gradients[0]), strict=True):
            if member.rows is None:
                yield GradientPlace(member.variable.tensor, view)

    def gather(self) -> None:
        if self.is_direct:
            self._bring_home()  # the update is made there, and not in other memory that is copied
        present = self._gathered()
        are_all = all(present)
        self._moving = [
            parameters.tensors if are_all else list(compress(parameters.tensors, present))
            for parameters in self._parameters
        ]
        if not any(present):
            self._pushed = []
            return
        ranges = None if are_all else merge(list(compress(self.plan.layout.ranges, present)), self._gap)
        if self._replica_gradients[0] is not self.gradients:
            with self._copies.aside():
                for start, stop in pieces(ranges or [(0, self.plan.layout.size)]):
                    self._reduce(start, stop)
        part = Part(self.plan.index, "rule", ranges, self._settings.now())
        if self._pushed != [part]:  # else the same one, so that who gets it sees at once that nothing has changed
            self._pushed = [part]

    def parts(self) -> list[Part]:
        return self._pushed

    def meanwhile(self) -> None:
        if not self.is_direct:
            self._bring_home()
        # The lane writes values behind autograd's back: a graph that was built on the old ones must not go unnoticed.
        for tensors in self._moving:
            torch.autograd.graph.increment_version(tensors)

    def pulled(self) -> None:
        if self._blocks or self._copied:  # else the memory is what the module uses, and that is all
            self.refreshed()

    def refreshed(self) -> None:
        super().refreshed()
        for parameter in self._copied:
            parameter.pulled()

    def _bind_replica(self, replica: int, block: torch.Tensor) -> None:
        is_only_one = len(self._tensors.devices) == 1 and block is self.values
        gradients = self.gradients if is_only_one else torch.zeros_like(block)
        if not is_only_one:
            self._copies.use(gradients, self._tensors.devices[replica])
        views = zip(self.plan.members, self.plan.layout.views(block), self.plan.layout.views(gradients), strict=True)
        bound = [
            bound_parameter.bind(member, self._tensors.of(member.variable.tensor)[replica], value, gradient)
            for member, value, gradient in views
        ]
        self._replica_gradients.append(gradients)
        self._parameters.append(BoundParameters(bound))
        self._copied.extend(
            parameter
            for parameter, member in zip(bound, self.plan.members, strict=True)
            if member.rows is not None and (replica == 0 or not _share(parameter.tensor, member.variable.tensor))
        )

    def _bring_home(self) -> None:
        for parameters in self._parameters:
            parameters.bring_home()

    def _gathered(self) -> list[bool]:
        """Which parameters have a gradient; each is in its place then, on every replica."""
        if len(self._parameters) == 1:
            return self._parameters[0].present()
        has = [parameters.present() for parameters in self._parameters]
        present = list(map(any, zip(*has, strict=True)))
        for own, gradients in zip(has, self._replica_gradients, strict=True):
            for (start, stop), is_here, is_anywhere in zip(self.plan.layout.ranges, own, present, strict=True):
                if is_anywhere and not is_here:
                    gradients[start:stop].zero_()
        return present

    def _reduce(self, start: int, stop: int) -> None:
        """The weighted sum of all replicas' gradients, into the memory that is pushed."""
        first, *others = (gradients[start:stop] for gradients in self._replica_gradients)
        if not others:
            self._copies.copy(self.gradients[start:stop], first)
            return
        total = first * self._weight  # before the sum, which could overflow in half precision
        for other in others:
            total.add_(other.to(first.device), alpha=self._weight)
        self._copies.copy(self.gradients[start:stop], total)


class CountedArena(BoundArena):
    """Buffers that are changed by adding. Between steps the gradient memory holds what the values were at the last."""

    def copied_memory(self) -> list[torch.Tensor]:
        return [self.values, self.gradients]

    def gather(self) -> None:
        super().gather()
        self._average(self.values)

    def parts(self) -> list[Part]:
        return [] if self.is_direct else self._parts_of_move(self.gradients, self.values)

    def refreshed(self) -> None:
        super().refreshed()
        if not self.is_direct:
            self.gradients.copy_(self.values)

    def _average(self, out: torch.Tensor) -> None:
        """What all replicas together have come to, on its way to ``out``."""
        if len(self._replica_values) == 1 and not self._blocks:
            return  # it is there already
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

    def _parts_of_move(self, before: torch.Tensor, after: torch.Tensor) -> list[Part]:
        """How to push what the values have changed by, which lies in the gradient memory then."""
        moved = before != after
        if not moved.any():
            return []
        torch.sub(after, before, out=self.gradients)
        self.gradients.masked_fill_(moved.logical_not_(), 0)  # infinity less itself would not be zero
        if self.gradients.isfinite().all():
            return [Part(self.plan.index, "add")]
        return self._parts_of_infinite_moves(after)

    def _parts_of_infinite_moves(self, after: torch.Tensor) -> list[Part]:
        index, layout = self.plan.index, self.plan.layout
        views = layout.views(self.gradients)
        finite = [bool(view.isfinite().all()) for view in views]
        for view, value, is_finite in zip(views, layout.views(after), finite, strict=True):
            if not is_finite:
                view.copy_(value)
        assigned = compress(layout.ranges, (not is_finite for is_finite in finite))
        return [
            Part(index, "add", tuple(compress(layout.ranges, finite))),
            Part(index, "assign", tuple(assigned)),
        ]


class PipelinedCountedArena(CountedArena):
    """Buffers of a pipelined model, which the next step changes before the values of this one are here.

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
        self._pushed = torch.zeros_like(self.values)  # what of the replicas' values the ps tasks have, or will have

    def copied_memory(self) -> list[torch.Tensor]:
        return [*super().copied_memory(), self._reached]

    def gather(self) -> None:
        BoundArena.gather(self)
        self._average(self._reached)

    def parts(self) -> list[Part]:
        parts = self._parts_of_move(self._pushed, self._reached)
        self._pushed.copy_(self._reached)
        with self._copies.aside():
            for block in self._replica_values:
                self._copies.copy(block, self._reached)
        return parts

    def pulled(self) -> None:
        """What others have changed is added to what this worker has changed since."""
        moved = self._pushed != self.values
        if not moved.any():
            return
        move = torch.sub(self.values, self._pushed, out=self.gradients)  # nothing is pushed from there by now
        move.masked_fill_(moved.logical_not_(), 0)
        with self._copies.aside():
            for block in self._replica_values:
                shifted = block + self._beside(block, move)
                block.copy_(torch.where(shifted.isfinite(), shifted, self._beside(block, self.values)))
        self._pushed.copy_(self.values)

    def refreshed(self) -> None:
        BoundArena.refreshed(self)
        self._pushed.copy_(self.values)

    def _beside(self, block: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """A copy of the lanes' memory on a block's device."""
        beside = torch.empty_like(block)
        self._copies.copy(beside, source)
        return beside


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether their values are the same memory."""
    return one.device == other.device and one.data_ptr() == other.data_ptr()
