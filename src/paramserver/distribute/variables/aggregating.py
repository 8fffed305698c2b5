"""A variable of a worker with several replicas: combines their values before the ps receives one."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.context import Replica
from paramserver.distribute.core.values import local_results
from paramserver.distribute.variables import updating
from paramserver.distribute.variables.variable import Assignment, Variable, VariableAggregation, here


class AggregatingVariable(Variable):
    """Wrapper of a variable, and the object that the program holds; see `Variable`.

    * In a replica, an assignment waits for those of the other replicas; then the sum, mean or first value of all is
      assigned once. A value that is the same object on all replicas counts once for each replica.
    * In cross-replica context and outside of all scopes, an assignment is an `update` of the wrapped variable, with any
      aggregation.
    * In an update, an assignment goes directly to the wrapped variable.

    Args:
        inner: The variable on a ps; gets a weak reference to this object.
    """

    def __init__(self, inner: Variable) -> None:
        self._inner = inner
        self.name, self.shape, self.dtype, self.device = inner.name, inner.shape, inner.dtype, inner.device
        self.trainable, self.aggregation, self.strategy, self.ps = (
            inner.trainable, inner.aggregation, inner.strategy, inner.ps
        )  # fmt: skip
        inner.container = weakref.ref(self)

    def get(self) -> Variable:
        """Return the wrapped variable."""
        return self._inner

    def value(self) -> torch.Tensor:
        return self._inner.value()

    def _assign(self, assignment: Assignment, value: Any) -> torch.Tensor:
        frame = context.current()
        if frame is None:
            with context.scope(self.strategy):
                return self._assign(assignment, value)
        self._check_strategy(assignment)
        if frame.update_device is not None:
            return self._inner._assign(assignment, value)
        if frame.replica is not None:
            return here(self._aggregate(frame.replica, assignment, value))
        return self._update(assignment, value)

    def _apply(self, assignment: Assignment, value: torch.Tensor) -> torch.Tensor:
        return self._inner._apply(assignment, value)

    def _update(self, assignment: Assignment, value: Any) -> torch.Tensor:
        updated: torch.Tensor = updating.update(
            self.strategy, self, lambda inner, value: inner._assign(assignment, value), (value,), {}, group=True
        )
        return updated

    def _aggregate(self, replica: Replica, assignment: Assignment, value: Any) -> torch.Tensor:
        if self.aggregation is VariableAggregation.NONE:
            raise ValueError(
                f"{assignment} to variable {self.name!r} in a replica: its aggregation is NONE, so the values of "
                "several replicas cannot be combined; pass `aggregation=` to ps.Variable, or use "
                "get_replica_context().merge_call() and strategy.extended.update()"
            )
        aggregated: torch.Tensor = replica.merge_call(
            lambda strategy, values: self._update(assignment, self._combined(values)),
            args=(self.fitted(assignment, value),),
        )
        return aggregated

    def _combined(self, values: Any) -> torch.Tensor:
        replicas: tuple[torch.Tensor, ...] = local_results(values)
        if self.aggregation is VariableAggregation.ONLY_FIRST_REPLICA:
            return replicas[0]
        count = self.strategy.num_replicas_in_sync
        if len(replicas) != count:  # all replicas have passed the same tensor
            replicas *= count
        total = sum(replicas[1:], start=replicas[0])
        if self.aggregation is VariableAggregation.SUM:
            return total
        return (total if total.is_floating_point() else total.double()) / count

    # --- attributes that only the wrapped variable has

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name.startswith("_") else getattr(self._inner, name)

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._inner[key]

    def __iter__(self) -> Any:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return f"<AggregatingVariable {self.aggregation.value} of {self._inner!r}>"
