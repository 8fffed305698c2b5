"""The creation of a program's own variable: its name, its ps, its parts, and its wrapper."""

from __future__ import annotations

import logging

import torch

from paramserver.client.client import ParameterClient
from paramserver.distribute.core import context
from paramserver.distribute.core.values import local_results
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.variables import anchor as anchors
from paramserver.distribute.variables.aggregating import AggregatingVariable
from paramserver.distribute.variables.plain import PlainVariable
from paramserver.distribute.variables.sharded import ShardedVariable
from paramserver.distribute.variables.variable import Variable, VariableOptions, tensor_of
from paramserver.layout.partition import part_specs
from paramserver.layout.variables import VariableSpec, dtype_name

logger = logging.getLogger(__name__)


def create(strategy: Worker, options: VariableOptions) -> Variable:
    """Create a variable in the scope of its strategy; on replicas, one for all of them. See `Variable`.

    Raises:
        RuntimeError: If the replicas create it under different names.
    """
    replica, anchor = context.current_replica(), anchors.current()
    if anchor is not None and anchor.strategy is not strategy:
        anchor = None  # set by a `beside` block of another strategy, whose scope was left inside the block
    if replica is None:
        return _create(strategy, options, anchor)
    created: Variable = replica.merge_call(
        lambda strategy, names: _create_for_all(strategy, local_results(names), options, anchor), args=(options.name,)
    )
    return created


def _create_for_all(
    strategy: Worker, names: tuple[str, ...], options: VariableOptions, anchor: Variable | None
) -> Variable:
    for replica, name in enumerate(names):
        if name != names[0]:
            raise RuntimeError(
                f"replica {replica} Tried to create variable {name!r} with mismatching name: replica 0 creates "
                f"{names[0]!r} now; all replicas must create the same variables in the same order"
            )
    return _create(strategy, options, anchor)


def _create(strategy: Worker, options: VariableOptions, anchor: Variable | None) -> Variable:
    initial = options.initial_value
    value = tensor_of(
        initial() if callable(initial) else initial, f"initial value of variable {options.name!r}", options.dtype
    )
    dtype = dtype_name(value.dtype, options.name)
    maker = _Maker(strategy, options, anchor)
    variables = maker.client.variables
    whole = VariableSpec(variables.unique_name(options.name), tuple(value.shape), dtype)
    ranges = [] if anchor is not None else strategy.row_ranges(whole)
    variable: Variable
    if ranges:
        parts = part_specs(whole, ranges)
        made = [maker.make(part, value[slice(*rows)]) for part, rows in zip(parts, ranges, strict=True)]
        variable = ShardedVariable(made, whole.name)
    else:
        parts = [whole]
        variable = maker.make(whole, value)
    variables.finish(whole.name, [part.name for part in parts])
    return AggregatingVariable(variable) if strategy.num_replicas_in_sync > 1 else variable


class _Maker:
    """Creates the parts of a variable on their ps tasks."""

    def __init__(self, strategy: Worker, options: VariableOptions, anchor: Variable | None) -> None:
        self.client: ParameterClient = strategy.connect()
        self._strategy = strategy
        self._options = options
        self._anchor = anchor

    def make(self, spec: VariableSpec, value: torch.Tensor) -> PlainVariable:
        """Create one part, on the next ps, or beside the anchor without taking a turn. Blocks until it exists."""
        anchor, variables = self._anchor, self.client.variables
        ps = variables.ps_of(spec.name, lambda: self._strategy.place(spec)) if anchor is None else anchor.ps
        if self._strategy.is_chief:
            self.client.variables.create(ps, spec, value.flatten())
        else:
            self.client.variables.find(ps, spec, self._strategy.session_creation_timeout, _Announcement(spec.name))
        return PlainVariable(self._strategy, self.client, ps, spec, self._options)


class _Announcement:
    """A log line, written once, that this task waits for a variable."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_made = False

    def __call__(self, waited: float) -> None:
        if not self._is_made:
            logger.info("waiting for the chief to create variable %r", self._name)
        self._is_made = True
