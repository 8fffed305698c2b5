"""A model whose parameters, gradients and buffers lie in the memory that lanes read and write.

Autograd writes each gradient, and a hook puts it in its place in the gradient memory as soon as it is whole, so that
no second copy of the gradients is ever alive. A step says which parts of the memory count, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from paramserver.arena import ALIGNMENT, Range, merge
from paramserver.client import ParameterClient, PushResult
from paramserver.distribute.variables import ArenaPlan, Kind
from paramserver.rules import Setting, rule_class, setting_names, settings
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part

logger = logging.getLogger(__name__)


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
        self._tensors = [variable.tensor for variable in plan.variables]

    def offer_values(self) -> None:
        """Lay the tensors' present values into the gradient memory, to be assigned."""
        for tensor, view in zip(self._tensors, self.plan.layout.views(self.gradients), strict=True):
            view.copy_(tensor.detach())

    def bind(self) -> None:
        """From now on the tensors' values are the value memory."""
        for tensor, view in zip(self._tensors, self.plan.layout.views(self.values), strict=True):
            tensor.data = view

    def part(self) -> Part | None:
        """What a step pushes of this arena; None if it is nothing."""
        return None

    def pulled(self) -> None:
        """The value memory is fresh."""


class TrainedArena(BoundArena):
    """Parameters of one optimizer group."""

    def __init__(self, plan: ArenaPlan, memory: WorkerMemory, group: dict[str, object]) -> None:
        super().__init__(plan, memory)
        self._group = group
        assert plan.layout.rule is not None  # noqa: S101  # a group has a rule
        self._names = setting_names(rule_class(plan.layout.rule))
        self._gradient_views = plan.layout.views(self.gradients)
        self._gap = ALIGNMENT // plan.layout.itemsize - 1

    def bind(self) -> None:
        super().bind()
        for tensor, view in zip(self._tensors, self._gradient_views, strict=True):
            tensor.register_post_accumulate_grad_hook(_lander(view))
            tensor.grad = None

    def part(self) -> Part | None:
        ranges = self._present()
        if ranges == ():
            return None
        return Part(self.plan.index, "rule", ranges, self._settings())

    def _settings(self) -> dict[str, Setting]:
        return settings(self._group, self._names)

    def _present(self) -> tuple[Range, ...] | None:
        """The ranges that have a gradient; None if all have. Brings home gradients that were set by hand."""
        absent = False
        for tensor, view in zip(self._tensors, self._gradient_views, strict=True):
            gradient = tensor.grad
            if gradient is None:
                absent = True
            elif gradient is not view:
                view.copy_(gradient)
                tensor.grad = view
        if not absent:
            return None
        ranges = zip(self._tensors, self.plan.layout.ranges, strict=True)
        return merge([span for tensor, span in ranges if tensor.grad is not None], self._gap)


class CountedArena(BoundArena):
    """Buffers that are changed by adding."""

    def __init__(self, plan: ArenaPlan, memory: WorkerMemory) -> None:
        super().__init__(plan, memory)
        self._is_shared = memory.direct
        self._before = torch.empty_like(self.values)

    def part(self) -> Part | None:
        if self._is_shared:
            return None
        torch.sub(self.values, self._before, out=self.gradients)
        return Part(self.plan.index, "add") if self.gradients.any() else None

    def pulled(self) -> None:
        if not self._is_shared:
            self._before.copy_(self.values)


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
        self._pulled = [
            [arena.plan.index for arena in arenas if arena.plan.kind in (Kind.TRAINED, Kind.COUNTED)]
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
        self._client.pull([[arena.plan.index for arena in arenas] for arenas in self._arenas])
        for arena in self._each():
            arena.pulled()
            arena.bind()

    def step(self) -> PushResult:
        """Push the gradients and what buffers changed by, and pull fresh values: one message to each ps."""
        parts = [[part for arena in arenas if (part := arena.part())] for arenas in self._arenas]
        pulled = [
            sorted({*always, *(part.arena for part in ps_parts)})
            for always, ps_parts in zip(self._pulled, parts, strict=True)
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


def _lander(view: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that puts a gradient into its place as soon as autograd has it whole."""

    def land(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is not view:
            if gradient is not None and gradient.is_sparse:
                raise NotImplementedError(_SPARSE.format(tuple(view.shape)))
            view.copy_(gradient)
            parameter.grad = view

    return land


_SPARSE = (
    "a parameter of shape {} got a sparse gradient, which cannot be pushed to a ps; "
    "use nn.Embedding(..., sparse=False)"
)
