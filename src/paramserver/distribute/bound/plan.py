"""The variables of a module on parameter servers, in the order in which every worker finds them.

Rules
    * Every parameter and every persistent buffer of the model is a variable, named as in ``state_dict()``. If several
      names share one tensor (tied weights), the first name is the variable's.
    * A parameter that an optimizer holds is updated by the optimizer's rule; all others are kept but never updated. A
      parameter that only sparse embeddings use is a table; see `tables.lookup`.
    * A policy determines how several workers' changes of a buffer are combined; see `buffer_policies`. A change that is
      not a finite number, such as one away from infinity, cannot be added: the new value is assigned.
    * Buffers that ``state_dict()`` does not hold are each worker's own.
    * A module that ``torch.compile`` has wrapped is named as without it, so that a checkpoint fits both.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from paramserver.distribute.bound import buffer_policies
from paramserver.distribute.bound.buffer_policies import BufferPolicy
from paramserver.distribute.bound.overlaps import check_apart
from paramserver.distribute.bound.tables.lookup import tables_of
from paramserver.errors import ConfigError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import Range
from paramserver.layout.partition import part_specs
from paramserver.layout.rules import Rule, describe, describe_row_rule
from paramserver.layout.variables import VariableSpec, dtype_name
from paramserver.memory.torch_internals import modules_of, non_persistent_buffers
from paramserver.placement import Place

RowRanges = Callable[[VariableSpec], Sequence[Range]]
"""Returns the ranges of rows that a variable is divided into; none or one for a variable that stays whole."""


class Kind(enum.Enum):
    """The way in which a variable changes."""

    TRAINED = "trained"
    FROZEN = "frozen"
    """Held by an optimizer, but without ``requires_grad`` at the start; may be trained later."""
    TABLE = "table"
    """Trained by rows; workers hold no values of it."""
    COUNTED = "counted"
    """A buffer, changed by adding each worker's change."""
    AVERAGED = "averaged"
    """A buffer, changed by adding each worker's change divided by the number of workers."""
    ASSIGNED = "assigned"
    """A buffer, to which a worker's new value is assigned."""
    OWN = "own"
    """A buffer of each worker's own; the ps holds the chief's."""
    CONSTANT = "constant"


_BUFFER_KINDS = {
    BufferPolicy.SUM: Kind.COUNTED,
    BufferPolicy.MEAN: Kind.AVERAGED,
    BufferPolicy.LAST: Kind.ASSIGNED,
    BufferPolicy.OWN: Kind.OWN,
}


@dataclass(frozen=True)
class ModelVariable:
    """A tensor of the model that lives on a ps.

    Attributes:
        spec: Its name, shape and dtype.
        tensor: The parameter or buffer.
        kind: The way in which it changes.
        group: The index of its optimizer group; -1 if it has none.
        module: The module whose buffer it is; None for a parameter.
    """

    spec: VariableSpec
    tensor: torch.Tensor
    kind: Kind
    group: int = -1
    module: nn.Module | None = None


@dataclass(frozen=True)
class Member:
    """One entry of an arena: a variable, or the rows of a partitioned variable on one ps.

    Attributes:
        variable: The whole variable.
        spec: The name, shape and dtype of the entry on the ps.
        rows: The rows of the variable; None for a variable that is not partitioned.
    """

    variable: ModelVariable
    spec: VariableSpec
    rows: Range | None = None


@dataclass(frozen=True)
class ArenaPlan:
    """One arena: its contents and its position."""

    layout: ArenaLayout
    members: tuple[Member, ...]
    ps: int
    index: int

    @property
    def kind(self) -> Kind:
        """The way in which its variables change."""
        return self.members[0].variable.kind

    @property
    def group(self) -> int:
        """The index of their optimizer group; -1 if they have none."""
        return self.members[0].variable.group


def collect(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    policies: Mapping[str, str | BufferPolicy] | None = None,
) -> list[ModelVariable]:
    """Return the variables of a model, in creation order: parameters first, then buffers.

    Param groups are numbered through all optimizers.

    Args:
        model: The model.
        optimizers: The optimizers that train it.
        policies: Policies of buffers; see `buffer_policies.choose`.

    Raises:
        ConfigError: If an optimizer holds a parameter that is not the model's, or that another optimizer holds; if a
            tensor cannot live on a ps; if tensors share memory; or if a policy fits no buffer.
    """
    groups, tables = _groups(optimizers), tables_of(model)
    variables: dict[int, ModelVariable] = {}
    for name, parameter in named_parameters(model):
        kind, group = _change(parameter, groups, is_table=id(parameter) in tables)
        variables.setdefault(id(parameter), ModelVariable(_spec(name, parameter), parameter, kind, group))
    buffers = list(persistent_buffers(model))
    chosen = buffer_policies.choose({name: buffer.dtype for name, buffer, _ in buffers}, policies)
    for name, buffer, module in buffers:
        kind = _BUFFER_KINDS[chosen[name]]
        variables.setdefault(id(buffer), ModelVariable(_spec(name, buffer), buffer, kind, module=module))
    strangers = groups.keys() - variables.keys()
    if strangers:
        raise ConfigError(
            f"prepare: the optimizer holds {len(strangers)} parameters that the model does not have; "
            "pass the module that owns all parameters of the optimizer"
        )
    left = {plain_name(name): buffer for name, buffer in model.named_buffers() if id(buffer) not in variables}
    check_apart({variable.spec.name: variable.tensor for variable in variables.values()}, left)
    return list(variables.values())


def plain_name(name: str) -> str:
    """Return the name of a variable without the parts that ``torch.compile`` adds.

    >>> plain_name("_orig_mod.encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace("_orig_mod.", "")


def load_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Load values by plain name into a model, whether or not it is compiled.

    Raises:
        RuntimeError: If the values do not fit the model.
    """
    names = {plain_name(name): name for name in model.state_dict(keep_vars=True)}
    model.load_state_dict({names.get(name, name): value for name, value in values.items()})


def without_compiling(model: nn.Module) -> nn.Module:
    """Return a model after replacing each module that ``torch.compile`` has wrapped by the module's original."""
    for module in model.modules():
        for name, child in modules_of(module).items():
            if child is not None:
                modules_of(module)[name] = _original(child)
    return _original(model)


def _original(module: nn.Module) -> nn.Module:
    wrapped = modules_of(module).get("_orig_mod")
    return module if wrapped is None else wrapped


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter with each of its names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield plain_name(name), parameter


def aliases(model: nn.Module) -> dict[str, str]:
    """Return the additional names of tensors with several names, each with the name of its variable."""
    first: dict[int, str] = {}
    others: dict[str, str] = {}
    buffers = ((name, buffer) for name, buffer, _ in persistent_buffers(model))
    for name, tensor in (*named_parameters(model), *buffers):
        known = first.setdefault(id(tensor), name)
        if known != name:
            others[name] = known
    return others


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Yield name and tensor of each buffer that ``state_dict()`` holds, and the module that registers it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in non_persistent_buffers(module):
                yield plain_name(f"{prefix}.{name}" if prefix else name), buffer, module


def plan(
    variables: Sequence[ModelVariable],
    optimizers: Sequence[torch.optim.Optimizer],
    place: Place,
    num_ps: int,
    row_ranges: RowRanges = lambda _: [],
) -> list[list[ArenaPlan]]:
    """Return the arenas of each ps: one for each dtype, optimizer group and kind of its variables.

    Args:
        variables: The result of `collect`.
        optimizers: The optimizers whose param groups the variables belong to.
        place: Returns the ps for the next variable, or part of one.
        num_ps: Number of ps tasks.
        row_ranges: Returns the row ranges of a parameter that an optimizer holds; empty if the parameter stays whole.
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in range(len(optimizer.param_groups))]
    together: list[dict[tuple[str, int, Kind, str], list[Member]]] = [{} for _ in range(num_ps)]
    for variable in variables:
        for member in _members(variable, row_ranges):
            table = member.spec.name if variable.kind is Kind.TABLE else ""
            key = (variable.spec.dtype, variable.group, variable.kind, table)
            together[place(member.spec)].setdefault(key, []).append(member)
    return [
        [_arena(members, groups, ps, index) for index, members in enumerate(arenas.values())]
        for ps, arenas in enumerate(together)
    ]


def _members(variable: ModelVariable, row_ranges: RowRanges) -> list[Member]:
    ranges = row_ranges(variable.spec) if variable.group >= 0 else []
    if len(ranges) < 2:
        return [Member(variable, variable.spec)]
    specs = part_specs(variable.spec, ranges)
    return [Member(variable, spec, rows) for spec, rows in zip(specs, ranges, strict=True)]


def _arena(
    members: list[Member], groups: Sequence[tuple[torch.optim.Optimizer, int]], ps: int, index: int
) -> ArenaPlan:
    variable, spec = members[0].variable, members[0].spec
    is_table = variable.kind is Kind.TABLE
    layout = ArenaLayout(
        spec.dtype, _rule(variable, groups), tuple(member.spec for member in members), is_table=is_table
    )
    return ArenaPlan(layout, tuple(members), ps, index)


def _rule(variable: ModelVariable, groups: Sequence[tuple[torch.optim.Optimizer, int]]) -> Rule | None:
    if variable.group < 0:
        return None
    optimizer, group = groups[variable.group]
    if variable.kind is Kind.TABLE:
        return describe_row_rule(optimizer, group, variable.spec.name)
    return describe(optimizer, group)


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, int]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found: dict[int, int] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            if found.setdefault(id(parameter), index) != index:
                raise ConfigError(
                    f"prepare: a parameter of shape {list(parameter.shape)} is held by two optimizers; "
                    "every parameter has one update rule, give it to one of them"
                )
    return found


def _change(parameter: torch.Tensor, groups: dict[int, int], *, is_table: bool) -> tuple[Kind, int]:
    """Return the kind of a parameter, and the index of its optimizer group."""
    if id(parameter) not in groups or not parameter.is_floating_point():
        return Kind.CONSTANT, -1  # no optimizer holds it, or autograd cannot train its dtype
    if is_table and parameter.requires_grad and parameter.numel():
        return Kind.TABLE, groups[id(parameter)]
    return Kind.TRAINED if parameter.requires_grad else Kind.FROZEN, groups[id(parameter)]


def _spec(name: str, tensor: torch.Tensor) -> VariableSpec:
    if is_lazy(tensor):
        raise ConfigError(f"prepare: {name!r} has no shape yet; run the lazy module once before prepare")
    if tensor.is_meta:
        raise ConfigError(
            f"prepare: {name!r} is on the meta device and has no values; "
            'call model.to_empty(device="cpu") and initialize it first'
        )
    if tensor.layout is not torch.strided:
        raise ConfigError(f"prepare: {name!r} is a sparse tensor ({tensor.layout}), and a ps holds dense ones")
    return VariableSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype, name))
