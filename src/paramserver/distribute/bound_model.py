"""A model whose parameters, gradients and buffers lie in the memory that lanes read and write.

Rules
    * Autograd writes each gradient, and a hook puts it into its place in the gradient memory as soon as it is whole, so
      that no second copy of the gradients is ever alive. A step says which parts of the memory count, and nothing else.
    * What a program puts in the place of a gradient, of ``parameter.data`` or of a buffer is brought home when the next
      step begins.
    * Values are the ps tasks': a parameter that a program changes by hand after `prepare` gets their value back with
      the next step, unless the ps is played in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import compress

import torch

from paramserver.arena import ALIGNMENT, DTYPES, VariableSpec, merge
from paramserver.client import ParameterClient, PushResult
from paramserver.distribute.direct_gradients import GradientPlace
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
        self.values = memory.values[plan.index]
        self.gradients = memory.gradients[plan.index]
        self.is_direct = memory.direct
        self._gradient_views = plan.layout.views(self.gradients)

    def offer_values(self) -> None:
        """Lay the tensors' present values into the gradient memory, to be assigned."""
        for variable, view in zip(self.plan.variables, self._gradient_views, strict=True):
            view.copy_(variable.tensor.detach())

    def bind(self) -> None:
        """From now on the tensors' values are the value memory."""
        for variable, view in zip(self.plan.variables, self.plan.layout.views(self.values), strict=True):
            variable.tensor.data = view

    def parts(self) -> list[Part]:
        """What a step pushes of this arena."""
        for variable in self.plan.variables:
            if variable.module is not None:
                _bring_home(variable, variable.module)
        return []

    def pulled(self) -> None:
        """The value memory is fresh."""


class TrainedArena(BoundArena):
    """Parameters of one optimizer group."""

    def __init__(self, plan: ArenaPlan, memory: WorkerMemory, group: dict[str, object]) -> None:
        super().__init__(plan, memory)
        assert plan.layout.rule is not None  # noqa: S101  # a group has a rule
        self._group = group
        self._setting_names = setting_names(rule_class(plan.layout.rule))
        self._gap = ALIGNMENT // plan.layout.itemsize - 1
        self._parameters: list[_BoundParameter] = []

    def bind(self) -> None:
        views = zip(self.plan.variables, self.plan.layout.views(self.values), self._gradient_views, strict=True)
        self._parameters = [_BoundParameter(variable, value, gradient) for variable, value, gradient in views]

    def gradient_places(self) -> Iterator[GradientPlace]:
        """Where each parameter's gradient belongs."""
        for variable, view in zip(self.plan.variables, self._gradient_views, strict=True):
            yield GradientPlace(variable.tensor, view)

    def parts(self) -> list[Part]:
        present = [parameter.has_gradient() for parameter in self._parameters]
        if not any(present):
            return []
        # The lane writes values behind autograd's back: a graph that was built on the old ones must not go unnoticed.
        torch.autograd.graph.increment_version([parameter.tensor for parameter in compress(self._parameters, present)])
        ranges = None if all(present) else merge(list(compress(self.plan.layout.ranges, present)), self._gap)
        return [Part(self.plan.index, "rule", ranges, settings(self._group, self._setting_names))]


class _BoundParameter:
    """A parameter, and the views that its values and its gradient lie in."""

    __slots__ = ("_address", "_gradient", "_land", "_spec", "_value", "tensor")

    def __init__(self, variable: Variable, value: torch.Tensor, gradient: torch.Tensor) -> None:
        self.tensor = variable.tensor
        self._spec = variable.spec
        self._value = value
        self._gradient = gradient
        self.tensor.data = value
        self._address = self.tensor.data_ptr()
        self._land = _lander(self._spec, self._gradient)
        self._call_when_whole()

    def has_gradient(self) -> bool:
        """Whether there is one; it and the values are in their places then, also if they were replaced by hand."""
        if self.tensor.data_ptr() != self._address:
            self._value.copy_(_same_kind(self._spec, self.tensor).detach())
            self.tensor.data = self._value
        gradient = self.tensor.grad
        if gradient is None:
            return False
        if gradient is not self._gradient:
            _same_kind(self._spec, self.tensor)
            self._land(self.tensor)
        return True

    def _call_when_whole(self) -> None:
        frozen = not self.tensor.requires_grad  # torch refuses the hook then, and would call it if trained later
        self.tensor.requires_grad_(True)
        self.tensor.register_post_accumulate_grad_hook(self._land)  # type: ignore[no-untyped-call]  # torch has no type
        self.tensor.requires_grad_(not frozen)


class CountedArena(BoundArena):
    """Buffers that are changed by adding. Between steps the gradient memory holds what the values were at the last."""

    def parts(self) -> list[Part]:
        super().parts()
        if self.is_direct:
            return []
        moved = self.values != self.gradients
        if not moved.any():
            return []
        torch.sub(self.values, self.gradients, out=self.gradients)
        self.gradients.masked_fill_(moved.logical_not_(), 0)  # infinity less itself would not be zero
        if self.gradients.isfinite().all():
            return [Part(self.plan.index, "add")]
        return self._parts_of_infinite_moves()

    def pulled(self) -> None:
        if not self.is_direct:
            self.gradients.copy_(self.values)

    def _parts_of_infinite_moves(self) -> list[Part]:
        index, layout = self.plan.index, self.plan.layout
        finite = [bool(view.isfinite().all()) for view in self._gradient_views]
        for view, value, is_finite in zip(self._gradient_views, layout.views(self.values), finite, strict=True):
            if not is_finite:
                view.copy_(value)
        assigned = compress(layout.ranges, (not is_finite for is_finite in finite))
        return [
            Part(index, "add", tuple(compress(layout.ranges, finite))),
            Part(index, "assign", tuple(assigned)),
        ]


class BoundModel:
    """All arenas of a model, and the client that pushes and pulls them.

    Args:
        arenas: The plan, for each ps.
        memories: The memory, for each ps.
        groups: The optimizer's param groups; read for every push.
        client: Owned by the caller.
    """

    def __init__(
        self,
        arenas: Sequence[Sequence[ArenaPlan]],
        memories: Sequence[WorkerMemory],
        groups: Sequence[dict[str, object]],
        client: ParameterClient,
    ) -> None:
        self._client = client
        self._arenas = [
            [_bound(plan, memory, groups) for plan in plans] for plans, memory in zip(arenas, memories, strict=True)
        ]
        self._always_pulled = [
            {arena.plan.index for arena in arenas if arena.plan.kind in (Kind.TRAINED, Kind.COUNTED)}
            for arenas in self._arenas
        ]

    def assign(self) -> None:
        """Make the model's present values those of the ps tasks."""
        for arena in self._each():
            arena.offer_values()
        parts = [[Part(arena.plan.index, "assign") for arena in arenas] for arenas in self._arenas]
        self._client.push_pull(parts, [() for _ in self._arenas], counts=False)

    def bind(self) -> None:
        """Give the model's tensors their place in the memory, holding the ps tasks' values."""
        for arena in self._each():
            arena.bind()  # before the values come, so that the model's own are gone by then
        self._client.pull([[arena.plan.index for arena in arenas] for arenas in self._arenas])
        for arena in self._each():
            arena.pulled()

    def gradient_places(self) -> dict[int, GradientPlace]:
        """Where each parameter's gradient belongs, by the id of the parameter."""
        trained = (arena for arena in self._each() if isinstance(arena, TrainedArena))
        return {id(place.parameter): place for arena in trained for place in arena.gradient_places()}

    def step(self) -> PushResult:
        """Push the gradients and what buffers changed by, and pull fresh values: one message to each ps."""
        parts = [[part for arena in arenas for part in arena.parts()] for arenas in self._arenas]
        pulled = [
            sorted({*always, *(part.arena for part in ps_parts)})
            for always, ps_parts in zip(self._always_pulled, parts, strict=True)
        ]
        result = self._client.push_pull(parts, pulled, counts=True)
        for arena in self._each():
            arena.pulled()
        return result

    def _each(self) -> list[BoundArena]:
        return [arena for arenas in self._arenas for arena in arenas]


def _bound(plan: ArenaPlan, memory: WorkerMemory, groups: Sequence[dict[str, object]]) -> BoundArena:
    match plan.kind:
        case Kind.TRAINED | Kind.FROZEN:
            return TrainedArena(plan, memory, groups[plan.group])
        case Kind.COUNTED:
            return CountedArena(plan, memory)
        case _:
            return BoundArena(plan, memory)


def _lander(spec: VariableSpec, view: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """What puts a parameter's gradient into its place; autograd calls it as soon as the gradient is whole."""
    address = view.data_ptr()

    def land(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient is view:
            return
        if gradient.layout is not torch.strided:
            raise NotImplementedError(
                f"variable {spec.name!r} got a sparse gradient, which cannot be pushed to a ps; "
                "use nn.Embedding(..., sparse=False)"
            )
        if gradient.dtype is not view.dtype:
            _same_kind(spec, parameter)
        if gradient.data_ptr() != address:  # else a large layer has computed it in its place
            view.copy_(gradient.detach() if gradient.requires_grad else gradient)
        parameter.grad = view

    return land


def _bring_home(variable: Variable, module: torch.nn.Module) -> None:
    """Where a module has put another tensor in a buffer's place, take over its values and put the buffer back."""
    name = variable.spec.name.rpartition(".")[2]
    found = module._buffers[name]
    if found is not variable.tensor:
        found = _same_kind(variable.spec, found)
        variable.tensor.copy_(found.detach())
        module._buffers[name] = variable.tensor


def _same_kind(spec: VariableSpec, found: torch.Tensor | None) -> torch.Tensor:
    """What was found in the place of a variable.

    Raises:
        ConfigError: If it is nothing, or of another shape or dtype.
    """
    if found is None or found.shape != spec.shape or found.dtype is not DTYPES[spec.dtype]:
        got = "nothing" if found is None else f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
        raise ConfigError(
            f"variable {spec.name!r} is {spec.dtype}{list(spec.shape)} on its ps, and the model has {got} in its "
            "place; a variable keeps its shape and dtype after prepare, convert the model before"
        )
    return found
