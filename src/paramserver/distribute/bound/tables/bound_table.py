"""A table of a model, bound to the ps tasks that hold its rows.

Rules
    * Rows come when a module looks them up. Their gradients go with the step, in the message that it sends anyway.
    * The replicas' gradients are merged without making them dense. Each row is sent once, with the sum of all gradients
      that replicas and batches have for it, or their mean.
    * Every part of a table takes part in each step in which the table has a gradient, even if no row of the part has
      one, so that all parts count the same steps.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

from paramserver.client.client import ParameterClient
from paramserver.distribute.bound.plan import ArenaPlan, Kind, ModelVariable
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.bound.tables.lookup import Embedding, Lookup, look_up_in, placeholder, tables_of
from paramserver.errors import ConfigError
from paramserver.layout.rules import find_rule
from paramserver.layout.settings import GroupSettings
from paramserver.memory.rows import Ids, Rows, loops_for
from paramserver.transport.lane import TableRows, WorkerMemory
from paramserver.wire.messages import Part

CHUNK_BYTES = 2 << 20
"""Largest number of bytes in one message when a table gets its first values, or is read whole.

It equals the push of a large batch, because the memory of pushed rows keeps the size of the largest push.
"""


class _Part(NamedTuple):
    """The position of rows ``[start, stop)`` of a table on the ps tasks."""

    start: int
    stop: int
    ps: int
    arena: int


class BoundTable:
    """One table, in which modules look up rows.

    Args:
        plans: The arenas of the table's parts.
        memories: The memory of each ps.
        tensors: The replicas' parameters.
        group: The param group; read for every push.
        client: The client, which pulls and pushes rows.
        mean: Whether the replicas' gradients are averaged; otherwise they are added up.

    Attributes:
        name: The name of the variable.
        group: The index of its param group.
        loops: The compiled loops over its rows; None for a small table.
    """

    def __init__(
        self,
        plans: Sequence[ArenaPlan],
        memories: Sequence[WorkerMemory],
        tensors: ReplicaTensors,
        group: dict[str, object],
        client: ParameterClient,
        *,
        mean: bool,
    ) -> None:
        (first, *_), variable = plans, plans[0].members[0].variable
        assert first.layout.rule is not None  # noqa: S101  # every table has a rule
        self.name = variable.spec.name
        self.group = first.group
        self._rows = variable.spec.shape[0]
        self._width = first.layout.table_shape[1]
        self._dtype = first.layout.torch_dtype
        self._parts = sorted(_Part(*(plan.members[0].rows or (0, self._rows)), plan.ps, plan.index) for plan in plans)
        memory = memories[first.ps]
        self._own_memory = memory.values[first.index] if memory.direct and len(plans) == 1 else None
        self._parameters = tensors.of(variable.tensor)
        self._settings = GroupSettings(group, find_rule(first.layout.rule).setting_names)
        self._weight = 1 / len(self._parameters) if mean else 1.0
        self._client = client
        self._is_held = True
        self.loops = loops_for(self._rows * self._width * self._dtype.itemsize, self._dtype)

    def assign(self, values: torch.Tensor) -> None:
        """Make these values, of shape ``[rows, width]``, the table's rows on the ps tasks."""
        for part, ids in self._chunks():
            rows = TableRows(ids, values[part.start + ids[0] : part.start + ids[-1] + 1].cpu().contiguous())
            parts: list[list[Part]] = [[] for _ in self._client.push_times]
            parts[part.ps] = [Part(part.arena, "assign", rows=len(ids))]
            plans = self._client.plan(parts, [() for _ in parts])
            self._client.push_pull(plans, counts=False, rows=[[rows] * len(each) for each in parts])

    def bind(self) -> None:
        """Free the values of the replicas' parameters: from now on rows come when they are looked up."""
        for parameter in self._parameters:
            parameter.data = placeholder(parameter)
            vars(parameter)["__deepcopy__"] = types.MethodType(_copy_of_placeholder, parameter)
        first = self._parameters[0]
        self._is_in_place = self._own_memory is not None and self._own_memory.device == first.device
        if self._own_memory is not None and self._is_in_place:
            first.data = self._own_memory.view(self._rows, self._width)
            del vars(first)["__deepcopy__"]

    def pull(self, ids: Ids) -> torch.Tensor:
        """Return rows of the table; see `lookup.Table`."""
        rows = TableRows(ids, torch.empty(len(ids), self._width, dtype=self._dtype, device="cpu"))
        self._client.pull_rows([(part.ps, part.arena, each) for part, each in self._divided(rows)])
        return rows.values

    def pull_batch(self, lookup: Lookup) -> torch.Tensor:
        """Return the rows of a batch; see `lookup.Table`."""
        batch = torch.empty(len(lookup.ids), self._width, dtype=self._dtype, device="cpu")
        part, *others = self._parts
        if not others and self._client.copy_rows(part.ps, part.arena, TableRows(lookup.ids, batch)):
            return batch
        return Rows(self.pull(lookup.rows), in_cache=True).take(lookup.places(), batch)

    def whole(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return all rows of the table; see `lookup.Table`."""
        if self._is_in_place:
            held = self._parameters[0]
            return None if weight is held else held.detach().clone()
        values = torch.empty(self._rows, self._width, dtype=self._dtype, device="cpu")
        for part, ids in self._chunks():
            rows = TableRows(ids, values[part.start + ids[0] : part.start + ids[-1] + 1])
            self._client.pull_rows([(part.ps, part.arena, rows)])
        return values

    def hold(self, held: set[int]) -> None:
        """Push the table only if it is among these parameters; see `HeldParameters`."""
        self._is_held = id(self._parameters[0]) in held

    def parts(self) -> list[tuple[int, Part, TableRows]]:
        """Return the parts of this table that a step pushes, each with its ps and its rows."""
        rows = self._gradients() if self._is_held else None
        if rows is None:
            return []
        numbers = self._settings.now()
        return [
            (part.ps, Part(part.arena, "rule", None, numbers, len(each.ids)), each)
            for part, each in self._divided(rows)
        ]

    def _gradients(self) -> TableRows | None:
        """Return the replicas' combined gradient; None if no replica has one."""
        found = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        for gradient in found:
            if gradient.layout is not torch.sparse_coo or gradient.dtype is not self._dtype:
                raise ConfigError(
                    f"variable {self.name!r} is a table of {self._dtype}, whose values workers do not hold, and it got "
                    f"a gradient of {gradient.dtype} and {gradient.layout}; use its weight in nn.Embedding only, or "
                    "make that sparse=False"
                )
        if not found:
            return None
        ids = _joined([gradient._indices().cpu() for gradient in found], 1)
        values = _joined([gradient._values().cpu() for gradient in found], 0)
        if self._weight != 1:
            values = values * self._weight
        named = ids[0].numpy()
        if np.any(named[1:] <= named[:-1]):  # otherwise it comes from a lookup, which names each row once
            merged = torch.sparse_coo_tensor(ids, values, found[0].shape, check_invariants=False).coalesce()
            ids, values = merged.indices(), merged.values()
        return TableRows(ids[0].numpy(), values.contiguous())

    def _divided(self, rows: TableRows) -> Iterator[tuple[_Part, TableRows]]:
        """Yield each part with its rows, under the part's own ids."""
        ids, values = rows
        if len(self._parts) == 1:
            yield self._parts[0], rows
            return
        for part in self._parts:
            first, last = np.searchsorted(ids, (part.start, part.stop))
            yield part, TableRows(ids[first:last] - part.start, values[first:last])

    def _chunks(self) -> Iterator[tuple[_Part, Ids]]:
        """Yield all rows, a few at a time, by their ids in the part that holds them."""
        count = max(CHUNK_BYTES // max(self._width * self._dtype.itemsize, 1), 1)
        for part in self._parts:
            for start in range(0, part.stop - part.start, count):
                yield part, np.arange(start, min(start + count, part.stop - part.start))

    def __deepcopy__(self, memo: object) -> BoundTable:
        return self  # a copy of the model looks up rows in the same table

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"variable {self.name!r} is a table whose rows lie on parameter servers, and a model that looks rows up "
            "there cannot be pickled; save model.state_dict(), which holds all rows"
        )

    def __repr__(self) -> str:
        return f"<BoundTable {self.name!r} of {self._rows} rows in {len(self._parts)} parts>"


def _copy_of_placeholder(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    """Copy a table's parameter for a copy of the model, which looks up rows in the same table.

    torch's own copy would be a tensor of all rows.
    """
    duplicate = memo[id(parameter)] = nn.Parameter(placeholder(parameter), parameter.requires_grad)
    vars(duplicate)["__deepcopy__"] = types.MethodType(_copy_of_placeholder, duplicate)
    return duplicate


def _joined(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return torch.cat(list(tensors), axis) if len(tensors) > 1 else tensors[0]


class Lookups(NamedTuple):
    """The first values of a table, and the modules that look up rows in it."""

    values: torch.Tensor
    modules: Sequence[Embedding]

    def use(self, table: BoundTable) -> None:
        """Have the modules look up rows in ``table`` from now on."""
        for module in self.modules:
            look_up_in(module, table)


def take_tables(
    model: nn.Module, variables: Iterable[ModelVariable], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Lookups]:
    """Take the values of tables out of a model, so that no move or copy includes them; return them by variable name.

    State that an optimizer has made for the tables goes, too: it is as large, and the ps tasks have their own.
    """
    modules, found = tables_of(model), dict[str, Lookups]()
    for variable in variables:
        if variable.kind is Kind.TABLE:
            weight = variable.tensor
            found[variable.spec.name] = Lookups(weight.detach(), modules[id(weight)])
            weight.data = placeholder(weight)
            for optimizer in optimizers:
                optimizer.state.pop(weight, None)
    return found


def by_table(arenas: Iterable[ArenaPlan]) -> list[list[ArenaPlan]]:
    """Return the arenas with parts of a table, as one list for each table."""
    found: dict[str, list[ArenaPlan]] = defaultdict(list)
    for plan in arenas:
        if plan.kind is Kind.TABLE:
            found[plan.members[0].variable.spec.name].append(plan)
    return list(found.values())
