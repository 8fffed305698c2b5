"""One arena of a model: its tensors on every replica, bound to the memory that the lanes read and write.

Rules
    * *Home* is the device of the memory. A replica that computes there uses the memory of the values itself; a replica
      elsewhere has a flat block of its own, which is copied as a whole. In a pipelined model every replica has such a
      block, because the lanes use the memory while the replica computes.
    * A single replica at home has its gradients in the memory that is pushed. Otherwise each replica has a flat block
      of gradients on its device, which no step changes, so that a program can keep gradients over steps; the blocks are
      added up on the first replica's device, piece by piece, into the memory that is pushed.
    * A step that fails before it is handed to the lanes has changed nothing that the next one pushes: `check`, `gather`
      and `parts` may be called again.
    * `gather` may return while copies are under way; after their end, `parts` returns what to push. `DeviceCopies`
      makes the copies.
    * A gradient that some replicas lack counts as zero there; a gradient that all lack is not pushed.
    * Buffers have a file of their own: `buffers`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Protocol

import torch

from paramserver.distribute.bound.device_copies import DeviceCopies, HostCopies
from paramserver.distribute.bound.gradient_place import Gate, GradientPlace
from paramserver.distribute.bound.parameters import BoundParameter, BoundParameters, WholeParameter, bind
from paramserver.distribute.bound.plan import ArenaPlan, Kind
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.bound.value_watch import ValueWatch
from paramserver.layout.arena import ALIGNMENT
from paramserver.layout.blocks import Range, join_ranges, pieces
from paramserver.layout.rules import find_rule
from paramserver.layout.settings import GroupSettings
from paramserver.memory.torch_internals import alias
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part


class PushedMemory(Protocol):
    """The memory that the lanes send gradients from.

    Attributes:
        gate: Shut while lanes may read the memory.
    """

    gate: Gate

    def renew(self, ps: int) -> None:
        """Move the gradients of all arenas of a ps to memory that no program refers to. Blocks.

        Calls `BoundArena.use_gradients`.
        """


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The memory and the tensors that an arena is bound to.

    Attributes:
        plan: The variables in the arena.
        memory: The memory of the ps that holds the arena.
        tensors: The tensors of all replicas.
        copies: The way to copy between blocks and memory.
        is_apart: Whether every replica needs a block apart from the memory.
    """

    plan: ArenaPlan
    memory: WorkerMemory
    tensors: ReplicaTensors
    copies: DeviceCopies = field(default_factory=HostCopies)
    is_apart: bool = False


class BoundArena:
    """The tensors of one arena, bound to its memory. The base class itself is for values that no step changes."""

    def __init__(self, binding: Binding) -> None:
        self.plan = binding.plan
        self.values = binding.memory.values[binding.plan.index]
        self.gradients = binding.memory.gradients[binding.plan.index]
        self.is_direct = binding.memory.direct
        self._tensors = binding.tensors
        self._copies = binding.copies
        self._is_apart = binding.is_apart
        self._home = self.values.device
        self._replica_values: list[torch.Tensor] = []
        self._blocks: list[torch.Tensor] = []
        self._homes = Homes()
        self._watch = ValueWatch([], [])

    def copied_memory(self) -> list[torch.Tensor]:
        """Return the lanes' memory that steps copy to blocks and back."""
        return []

    def offer_values(self) -> None:
        """Write the tensors' present values into the gradient memory, to be assigned."""
        for member, view in zip(self.plan.members, self.plan.layout.views(self.gradients), strict=True):
            tensor = member.variable.tensor.detach()
            view.copy_(tensor if member.rows is None else tensor[slice(*member.rows)])

    def bring_home(self) -> None:
        """Copy the values of the first replica's tensors to the value memory."""
        for member, view in zip(self.plan.members, self.plan.layout.views(self.values), strict=True):
            tensor = member.variable.tensor.detach()
            view.copy_(tensor if member.rows is None else tensor[slice(*member.rows)])

    def bind(self) -> None:
        """Make the value memory, or blocks that are copied from it, the values of the tensors."""
        for replica, device in enumerate(self._tensors.devices):
            block = self._values_for(replica, device)
            self._replica_values.append(block)
            if block is not self.values:
                self._blocks.append(block)
                self._copies.use(block, device)
            self._bind_replica(replica, block)
        frozen = [member.variable for member in self.plan.members if member.variable.module is None]
        self._watch = ValueWatch([each.spec.name for each in frozen], [each.tensor for each in frozen])

    def use_gradients(self, gradients: torch.Tensor) -> None:
        """Push from other, zeroed memory from now on: a program still refers to the present memory."""
        self.gradients = gradients

    def hold(self, held: set[int]) -> None:
        """Push only the parameters with these ids; see `HeldParameters`."""

    def check(self) -> None:
        """Check, before a step pushes anything, that the program has not written any values.

        Raises:
            EditedError: If it has; the message names a parameter.
        """
        self._watch.check()

    def gather(self) -> None:
        """Begin to copy the data of a step to the memory that is pushed."""

    def parts(self) -> list[Part]:
        """Return the parts of this arena that a step pushes. Call it after `gather`, when all copies are done."""
        return []

    def meanwhile(self) -> None:
        """Do the work of a step that must be done before values come, but not before the push."""

    def pulled(self) -> None:
        """Use the fresh values that a step has pulled into the value memory."""
        self.refreshed()

    def refreshed(self) -> None:
        """Use the fresh contents of the value memory, after a pull of everything."""
        self._scatter()
        self.take_for_fresh()

    def take_for_fresh(self) -> None:
        """Regard the present values as the ps tasks', no matter what has written to them."""
        self._watch.reset()

    def evict(self) -> None:
        """Replace each gradient in the lanes' memory by a copy that the program owns."""

    def _scatter(self) -> None:
        """Copy the value memory to the tensors that are not views of it."""
        if self._blocks:
            with self._copies.aside():
                for block in self._blocks:
                    self._copies.copy(block, self.values)
        self._homes.scatter()

    def _values_for(self, replica: int, device: torch.device) -> torch.Tensor:
        holds_buffers = any(member.variable.module is not None for member in self.plan.members)
        is_home = device == self._home and (replica == 0 or not holds_buffers)
        return self.values if is_home and not self._is_apart else torch.empty_like(self.values, device=device)

    def _bind_replica(self, replica: int, block: torch.Tensor) -> None:
        for member, view in zip(self.plan.members, self.plan.layout.views(block), strict=True):
            self._homes.add(self._tensors.of(member.variable.tensor)[replica], view)


class TrainedArena(BoundArena):
    """The parameters of one optimizer group.

    Args:
        binding: As for `BoundArena`.
        group: The param group; read for every push.
        pushed: The memory that is pushed.
        mean: Whether the replicas' gradients are averaged; otherwise they are added up.
    """

    def __init__(self, binding: Binding, group: dict[str, object], pushed: PushedMemory, *, mean: bool) -> None:
        super().__init__(binding)
        plan = binding.plan
        assert plan.layout.rule is not None  # noqa: S101  # a group has a rule
        self._settings = GroupSettings(group, find_rule(plan.layout.rule).setting_names)
        self._gap = ALIGNMENT // plan.layout.itemsize - 1
        self._pushed_memory = pushed
        self._weight = 1 / len(binding.tensors.devices) if mean else 1.0
        self._replica_gradients: list[torch.Tensor] = []
        self._parameters: list[BoundParameters] = []
        self._copied: list[BoundParameter] = []
        self._pushed: list[Part] = []
        self._moving: list[bool] = []
        self._is_held: list[bool] = []  # empty if all parameters are held

    def copied_memory(self) -> list[torch.Tensor]:
        return [self.values, self.gradients] if self.plan.kind is Kind.TRAINED else []

    def gradient_places(self) -> Iterator[GradientPlace]:
        """Return the gradient place of each whole parameter on the first replica."""
        return (each.place for each in self._parameters[0].each if isinstance(each, WholeParameter))

    def use_gradients(self, gradients: torch.Tensor) -> None:
        if self._replica_gradients[0] is self.gradients:
            self._use_gradients(0, gradients)
        self.gradients = gradients

    def offer_values(self) -> None:
        if self._parameters and self._replica_gradients[0] is self.gradients:
            self._pushed_memory.renew(self.plan.ps)  # a program may refer to the gradients there
        super().offer_values()

    def hold(self, held: set[int]) -> None:
        is_held = [id(member.variable.tensor) in held for member in self.plan.members]
        self._is_held = [] if all(is_held) else is_held

    def check(self) -> None:
        moved = [parameters.check_values() for parameters in self._parameters]
        if any(moved):
            self._find_copied()

    def refreshed(self) -> None:
        for parameters in self._parameters:
            parameters.adopt()
        self._find_copied()
        super().refreshed()

    def _find_copied(self) -> None:
        self._copied = [each for parameters in self._parameters for each in parameters.each if each.is_apart]

    def gather(self) -> None:
        present = self._gathered()
        if self._is_held:
            present = list(map(operator.and_, present, self._is_held))
        self._moving = present
        ranges = None if all(present) else self._ranges(present)
        if ranges == ():
            self._pushed = []
            return
        if self._replica_gradients[0] is not self.gradients:
            with self._copies.aside():
                for start, stop in pieces(ranges or [(0, self.plan.layout.size)]):
                    self._reduce(start, stop)
        part = Part(self.plan.index, "rule", ranges, self._settings.now())
        if self._pushed != [part]:  # keep the same object, so that `_Step.request` sees at once that nothing changed
            self._pushed = [part]

    def _ranges(self, present: Sequence[bool]) -> tuple[Range, ...]:
        """Return the ranges of these parameters to push, without parameters that have no elements."""
        found = [(start, stop) for start, stop in compress(self.plan.layout.ranges, present) if start < stop]
        return join_ranges(found, self._gap)

    def parts(self) -> list[Part]:
        return self._pushed

    def meanwhile(self) -> None:
        for parameters in self._parameters:
            parameters.advance(self._moving)

    def pulled(self) -> None:
        if self._blocks or self._copied:  # otherwise the module uses the memory itself
            self._scatter()

    def take_for_fresh(self) -> None:
        for parameters in self._parameters:
            parameters.take_for_fresh()

    def evict(self) -> None:
        if self._replica_gradients[0] is self.gradients:
            for place in self.gradient_places():
                place.evict()

    def _scatter(self) -> None:
        super()._scatter()
        for parameter in self._copied:
            parameter.pulled()

    def _bind_replica(self, replica: int, block: torch.Tensor) -> None:
        is_only_one = len(self._tensors.devices) == 1 and block is self.values
        gradients = self.gradients if is_only_one else torch.zeros_like(block)
        if not is_only_one:
            self._copies.use(gradients, self._tensors.devices[replica])
        gate = self._pushed_memory.gate if is_only_one else Gate()
        views = zip(self.plan.members, self.plan.layout.views(block), self.plan.layout.views(gradients), strict=True)
        bound = [
            bind(member, self._tensors.of(member.variable.tensor)[replica], value, gradient, gate)
            for member, value, gradient in views
        ]
        self._replica_gradients.append(gradients)
        self._parameters.append(BoundParameters(bound))

    def _gather_replica(self, replica: int) -> list[bool]:
        present = self._parameters[replica].gather()
        if present is None:
            self._renew_replica(replica)
            present = self._parameters[replica].gather()
            assert present is not None  # noqa: S101  # nothing refers to the new places
        return present

    def _renew_replica(self, replica: int) -> None:
        """Give a replica gradient places that no program refers to."""
        if self._replica_gradients[replica] is self.gradients:
            self._pushed_memory.renew(self.plan.ps)
            return
        gradients = torch.zeros_like(self._replica_gradients[replica])
        self._copies.use(gradients, self._tensors.devices[replica])
        self._use_gradients(replica, gradients)

    def _use_gradients(self, replica: int, gradients: torch.Tensor) -> None:
        self._replica_gradients[replica] = gradients
        self._parameters[replica].use_gradients(self.plan.layout.views(gradients))

    def _gathered(self) -> list[bool]:
        """Put all gradients into their places; return for each parameter whether any replica has one."""
        if len(self._parameters) == 1:
            return self._gather_replica(0)
        has = [self._gather_replica(replica) for replica in range(len(self._parameters))]
        present = list(map(any, zip(*has, strict=True)))
        for own, gradients in zip(has, self._replica_gradients, strict=True):
            for (start, stop), is_here, is_anywhere in zip(self.plan.layout.ranges, own, present, strict=True):
                if is_anywhere and not is_here:
                    gradients[start:stop].zero_()
        return present

    def _reduce(self, start: int, stop: int) -> None:
        """Write the weighted sum of all replicas' gradients into the memory that is pushed."""
        first, *others = (gradients[start:stop] for gradients in self._replica_gradients)
        if not others:
            self._copies.copy(self.gradients[start:stop], first)
            return
        total = first * self._weight  # before the sum, which could overflow in half precision
        for other in others:
            total.add_(other.to(first.device), alpha=self._weight)
        self._copies.copy(self.gradients[start:stop], total)


class Homes:
    """Tensors whose values are in the memory of an arena, or apart from it.

    The values are apart if the tensor's memory layout is not row by row, or a program has moved the tensor, for example
    into shared memory.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []
        self._addresses: list[int] = []

    def add(self, tensor: torch.Tensor, view: torch.Tensor) -> None:
        """Make a view of the memory the values of a tensor, if the tensor's layout allows that."""
        if tensor.is_contiguous():
            tensor.data = alias(view)
        self._tensors.append(tensor)
        self._views.append(view)
        self._addresses.append(view.data_ptr())

    def gather(self) -> None:
        """Copy the values of tensors apart from the memory into it."""
        for tensor, view in self._beside():
            view.copy_(tensor)

    def scatter(self) -> None:
        """Copy the memory to the tensors apart from it."""
        for tensor, view in self._beside():
            tensor.copy_(view)

    def _beside(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = list(map(torch.Tensor.data_ptr, self._tensors))
        if found == self._addresses:
            return []
        is_beside = map(operator.ne, found, self._addresses)
        return [
            (tensor.detach(), view)
            for tensor, view in compress(zip(self._tensors, self._views, strict=True), is_beside)
        ]
