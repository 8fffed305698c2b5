"""A model whose parameters, gradients and buffers lie in the memory that lanes read and write.

Autograd writes each gradient, and a hook puts it in its place in the gradient memory as soon as it is whole, so that
no second copy of the gradients is ever alive. A step says which parts of the memory count, and nothing else.

Rules
    * Whatever a program does to ``parameter.grad``, to ``parameter.data`` or to a buffer, by changing it or by putting
      another tensor in its place, is brought home when the next step begins.
    * Values are the ps tasks': a parameter that a program changes by hand after `prepare` gets their value back with
      the next step, unless the ps is played in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paramserver.arena import ALIGNMENT, Range, merge
from paramserver.client import ParameterClient, PushResult
from paramserver.distribute.variables import ArenaPlan, Kind, Variable
from paramserver.errors import ConfigError
from paramserver.rules import rule_class, setting_names, settings
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part


class BoundArena:
    """The tensors of one arena, bound to its memory.

    Args:
        plan: What lies in the arena.
        memory: The memory of the ps that holds it.
    """

    def __init__(self, plan: ArenaPlan, memory: WorkerMemory) -> None:
        self.plan = plan
        self.is_direct = memory.direct
        self.values = memory.values[plan.index]
        self.gradients = memory.gradients[plan.index]
        self.gradient_views = plan.layout.views(self.gradients)
        self.tensors = [variable.tensor for variable in plan.variables]
        self._buffers = [variable for variable in plan.variables if variable.module is not None]

    def offer_values(self) -> None:
        """Lay the tensors' present values into the gradient memory, to be assigned."""
        for tensor, view in zip(self.tensors, self.gradient_views, strict=True):
            view.copy_(tensor.detach())

    def bind(self) -> None:
        """From now on the tensors' values are the value memory, which is fresh."""
        for tensor, view in zip(self.tensors, self.plan.layout.views(self.values), strict=True):
            tensor.data = view
        self.pulled()

    def parts(self) -> list[Part]:
        """What a step pushes of this arena."""
        for variable in self._buffers:
            _bring_home(variable)
        return []

    def pulled(self) -> None:
        """The value memory is fresh."""


class TrainedArena(BoundArena):
    """Parameters of one optimizer group."""

    def __init__(self, plan: ArenaPlan, memory: WorkerMemory, group: dict[str, object]) -> None:
        super().__init__(plan, memory)
        self._group = group
        assert plan.layout.rule is not None  # noqa: S101  # a group has a rule
        self._names = setting_names(rule_class(plan.layout.rule))
        self._gap = ALIGNMENT // plan.layout.itemsize - 1
        self._places: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._whole = Part(plan.index, "rule", None, {})

    def bind(self) -> None:
        super().bind()
        for variable, view in zip(self.plan.variables, self.gradient_views, strict=True):
            _call_when_accumulated(variable.tensor, _lander(variable.spec.name, view))
            self._places.append((variable.tensor, view, variable.tensor.data_ptr()))

    def parts(self) -> list[Part]:
        absent = False
        for place in self._places:
            tensor, view, address = place
            if tensor.data_ptr() != address:
                self._rehouse(tensor)
            gradient = tensor.grad
            if gradient is None:
                absent = True
            elif gradient is not view:
                _land(self._name(tensor), tensor, view)
        numbers = settings(self._group, self._names)
        if absent:
            return self._present(numbers)
        torch.autograd.graph.increment_version(self.tensors)
        return [Part(self.plan.index, "rule", None, numbers)]
