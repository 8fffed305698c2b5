"""What of a module lives on parameter servers: its variables, in the order that every worker finds them in.

Rules
    * Every parameter and every persistent buffer of the model is a variable, named as in ``state_dict()``. Of names
      that share one tensor (tied weights), the first is the variable's.
    * A parameter that an optimizer holds is updated by its rule; all others are kept but never updated.
    * A floating point or integer buffer (BatchNorm's running statistics, counters) is updated by adding what each
      worker changed it by: for one worker that is its own value (but for the rounding of the sum), for several the
      sum of their moves, as in the original. A move that is no number, such as one away from infinity, cannot be
      added: it is assigned. A boolean buffer keeps the chief's value.
    * Buffers that ``state_dict()`` does not hold are each worker's own.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from paramserver.arena import ArenaLayout, VariableSpec, dtype_name
from paramserver.errors import ConfigError
from paramserver.placement import Place
from paramserver.rules import Rule, describe


class Kind(enum.Enum):
    """How a variable changes."""

    TRAINED = "trained"
    FROZEN = "frozen"
    """Held by an optimizer, but without ``requires_grad`` at the start; may be trained later."""
    COUNTED = "counted"
    """A buffer, changed by adding."""
    CONSTANT = "constant"


@dataclass(frozen=True)
class Variable:
    """A tensor of the model that lives on a ps.

    Attributes:
        spec: Its name, shape and dtype.
        tensor: The parameter or buffer.
        kind: How it changes.
        group: The index of its optimizer group, -1 if it has none.
        module: The module whose buffer it is, None for a parameter.
    """

    spec: VariableSpec
    tensor: torch.Tensor
    kind: Kind
    group: int = -1
    module: nn.Module | None = None


@dataclass(frozen=True)
class ArenaPlan:
    """One arena: what lies in it and where it is."""

    layout: ArenaLayout
    variables: tuple[Variable, ...]
    ps: int
    index: int

    @property
    def kind(self) -> Kind:
        """How its variables change."""
        return self.variables[0].kind

    @property
    def group(self) -> int:
        """The index of their optimizer group, -1 if they have none."""
        return self.variables[0].group


def collect(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Variable]:
    """The variables of a model, in creation order: parameters first, then buffers.

    Raises:
        ConfigError: If the optimizer holds a parameter that is not the model's, or a tensor cannot live on a ps.
    """
    groups = _groups(optimizer)
    variables: dict[int, Variable] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kind, group = _change(parameter, groups)
        variables.setdefault(id(parameter), Variable(_spec(name, parameter), parameter, kind, group))
    for name, buffer, module in persistent_buffers(model):
        kind = Kind.CONSTANT if buffer.dtype is torch.bool else Kind.COUNTED
        variables.setdefault(id(buffer), Variable(_spec(name, buffer), buffer, kind, module=module))
    strangers = groups.keys() - variables.keys()
    if strangers:
        raise ConfigError(
            f"prepare: the optimizer holds {len(strangers)} parameters that the model does not have; "
            "pass the module that owns all parameters of the optimizer"
        )
    return list(variables.values())


def aliases(model: nn.Module) -> dict[str, str]:
    """The other names of tensors that have several, and the name of the variable that each one means."""
    first: dict[int, str] = {}
    others: dict[str, str] = {}
    buffers = ((name, buffer) for name, buffer, _ in persistent_buffers(model))
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers):
        known = first.setdefault(id(tensor), name)
        if known != name:
            others[name] = known
    return others


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Name and tensor of each buffer that ``state_dict()`` holds, and the module that it is registered in."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer, module


def plan(
    variables: Sequence[Variable], optimizer: torch.optim.Optimizer | None, place: Place, num_ps: int
) -> list[list[ArenaPlan]]:
    """The arenas of each ps: one for each dtype, optimizer group and kind that it holds variables of."""
    rules = [describe(optimizer, group) for group in range(len(optimizer.param_groups))] if optimizer else []
    together: list[dict[tuple[str, int, Kind], list[Variable]]] = [{} for _ in range(num_ps)]
    for variable in variables:
        key = (variable.spec.dtype, variable.group, variable.kind)
        together[place(variable.spec)].setdefault(key, []).append(variable)
    return [
        [_arena(members, rules, ps, index) for index, members in enumerate(arenas.values())]
        for ps, arenas in enumerate(together)
    ]


def _arena(members: list[Variable], rules: list[Rule], ps: int, index: int) -> ArenaPlan:
    first = members[0]
    rule = rules[first.group] if first.group >= 0 else None
    layout = ArenaLayout(first.spec.dtype, rule, tuple(member.spec for member in members))
    return ArenaPlan(layout, tuple(members), ps, index)


def _groups(optimizer: torch.optim.Optimizer | None) -> dict[int, int]:
    groups = optimizer.param_groups if optimizer else []
    return {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}


def _change(parameter: torch.Tensor, groups: dict[int, int]) -> tuple[Kind, int]:
    """How a parameter changes, and its optimizer group."""
    if id(parameter) not in groups or not parameter.is_floating_point():
        return Kind.CONSTANT, -1  # nobody trains it, or autograd cannot
    return Kind.TRAINED if parameter.requires_grad else Kind.FROZEN, groups[id(parameter)]


def _spec(name: str, tensor: torch.Tensor) -> VariableSpec:
    if is_lazy(tensor):
        raise ConfigError(f"prepare: {name!r} has no shape yet; run the lazy module once before prepare")
    if tensor.is_meta:
        raise ConfigError(
            f"prepare: {name!r} is on the meta device and has no values; "
            'call model.to_empty(device="cpu") and initialize it first'
        )
    if tensor.device.type != "cpu":
        raise ConfigError(
            f"prepare: {name!r} is on {tensor.device}; parameters are trained on the CPU, call model.cpu() first"
        )
    if tensor.layout is not torch.strided:
        raise ConfigError(f"prepare: {name!r} is a sparse tensor ({tensor.layout}), and a ps holds dense ones")
    return VariableSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype, name))
