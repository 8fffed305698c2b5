"""What of a module lives on parameter servers: its variables, in the order that every worker finds them in.

Rules
    * Every parameter and every persistent buffer of the model is a variable, named as in ``state_dict()``. Of names
      that share one tensor (tied weights), the first is the variable's.
    * A parameter that an optimizer holds is updated by its rule; all others are kept but never updated. One that only
      sparse embeddings use is a table, which `embeddings` tells about.
    * How several workers' changes of a buffer become one is its policy; see `buffer_policies`. A change that is no
      number, such as one away from infinity, cannot be added: it is assigned.
    * Buffers that ``state_dict()`` does not hold are each worker's own.
    * A module that ``torch.compile`` has wrapped is called as without, so that a checkpoint fits both.
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
"""The ranges of rows that a variable is divided into; none or one for a variable that stays whole."""


class Kind(enum.Enum):
    """How a variable changes."""

    TRAINED = "trained"
    FROZEN = "frozen"
    """Held by an optimizer, but without ``requires_grad`` at the start; may be trained later."""
    TABLE = "table"
    """Trained by rows; workers hold no values of it."""
    COUNTED = "counted"
    """A buffer, changed by adding what each worker has changed it by."""
    AVERAGED = "averaged"
    """A buffer, changed by adding the share of a worker's change."""
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
class Member:
    """What lies in an arena: a variable, or the rows of a partitioned one that its ps holds.

    Attributes:
        variable: The whole variable.
        spec: What the ps knows it by.
        rows: Which of its rows, None for all of a variable that is not partitioned.
    """

    variable: ModelVariable
    spec: VariableSpec
    rows: Range | None = None


@dataclass(frozen=True)
class ArenaPlan:
    """One arena: what lies in it and where it is."""

    layout: ArenaLayout
    members: tuple[Member, ...]
    ps: int
    index: int

    @property
    def kind(self) -> Kind:
        """How its variables change."""
        return self.members[0].variable.kind

    @property
    def group(self) -> int:
        """The index of their optimizer group, -1 if they have none."""
        return self.members[0].variable.group


def collect(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    policies: Mapping[str, str | BufferPolicy] | None = None,
) -> list[ModelVariable]:
    """The variables of a model, in creation order: parameters first, then buffers.

    Param groups are counted through all optimizers.

    Args:
        model: The model.
        optimizers: What trains it.
        policies: Of buffers; see `buffer_policies.choose`.

    Raises:
        ConfigError: If an optimizer holds a parameter that is not the model's or another one's, a tensor cannot live
            on a ps, two of them share memory, or a policy fits no buffer.
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
    """The name of a variable without what ``torch.compile`` puts into it.

    >>> plain_name("_orig_mod.encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace("_orig_mod.", "")


def load_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Load values by plain name into a model, whether or not it is compiled.

    Raises:
        RuntimeError: If they do not fit the model.
    """
    names = {plain_name(name): name for name in model.state_dict(keep_vars=True)}
    model.load_state_dict({names.get(name, name): value for name, value in values.items()})


def without_compiling(model: nn.Module) -> nn.Module:
    """Return a model with its own modules in the place of those that ``torch.compile`` has wrapped; it is changed."""
    for module in model.modules():
        for name, child in modules_of(module).items():
            if child is not None:
                modules_of(module)[name] = _original(child)
    return _original(model)


def _original(module: nn.Module) -> nn.Module:
    wrapped = modules_of(module).get("_orig_mod")
    return module if wrapped is None else wrapped


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter, by all names that it has."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield plain_name(name), parameter


def aliases(model: nn.Module) -> dict[str, str]:
    """The other names of tensors that have several, and the name of the variable that each one means."""
    first: dict[int, str] = {}
    others: dict[str, str] = {}
    buffers = ((name, buffer) for name, buffer, _ in persistent_buffers(model))
    for name, tensor in (*named_parameters(model), *buffers):
        known = first.setdefault(id(tensor), name)
        if known != name:
            others[name] = known
    return others


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Name and tensor of each buffer that ``state_dict()`` holds, and the module that it is registered in."""
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
    """The arenas of each ps: one for each dtype, optimizer group and kind that it holds variables of.

    Args:
        variables: What `collect` found.
        optimizers: Whose param groups the variables belong to.
        place: The ps for the next variable, or part of one.
        num_ps: How many ps tasks there are.
        row_ranges: The parts of a parameter that an optimizer holds; none for one that stays whole.
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
    """How a parameter changes, and its optimizer group."""
    if id(parameter) not in groups or not parameter.is_floating_point():
        return Kind.CONSTANT, -1  # nobody trains it, or autograd cannot
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
