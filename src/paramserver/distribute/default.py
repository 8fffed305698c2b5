"""The strategy and the replica that a program is in; outside of all scopes, those of a default strategy."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from paramserver.client.client import ParameterClient
from paramserver.distribute.bound.optimizer import PreparedOptimizer
from paramserver.distribute.core import context
from paramserver.distribute.core.input_context import InputContext, ValueContext
from paramserver.distribute.replicas.context import ReplicaContext
from paramserver.distribute.strategy import Strategy
from paramserver.layout.blocks import Range
from paramserver.layout.variables import VariableSpec

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def get_strategy() -> Strategy:
    """Return the strategy whose scope this thread is in; outside of all scopes, one with one replica and no ps."""
    frame = context.current()
    return cast("Strategy", frame.strategy) if frame else _default()  # only a Strategy enters a scope


def has_strategy() -> bool:
    """Return whether this thread is inside a strategy's scope.

    >>> has_strategy()
    False
    """
    return get_strategy() is not _default()


def get_replica_context() -> ReplicaContext | None:
    """Return this thread's replica; None in cross-replica context, a default replica outside of all scopes."""
    frame = context.current()
    return cast("ReplicaContext | None", frame.replica) if frame else _DefaultReplicaContext(_default(), 0)


def in_cross_replica_context() -> bool:
    """Return whether this thread is in the cross-replica context of a strategy: in its scope, or in a merge."""
    return context.in_cross_replica_context()


def in_replica_context() -> bool:
    """Return whether this thread is in a replica; outside of all scopes it is in the default one."""
    return not in_cross_replica_context()


def set_strategy(strategy: Strategy | None) -> None:
    """Enter a strategy's scope on this thread until the next call; None leaves it.

    Raises:
        RuntimeError: Inside a ``with strategy.scope():`` block.
    """
    context.set_base(strategy)


class _DefaultStrategy(Strategy):
    """The strategy outside of all scopes: one replica and no parameter servers."""

    @property
    def cluster_resolver(self) -> None:
        return None

    @property
    def is_chief(self) -> bool:
        return True

    @property
    def worker_devices(self) -> tuple[str, ...]:
        return ("/device:CPU:0",)

    @property
    def parameter_devices(self) -> tuple[str, ...]:
        return ("/device:CPU:0",)

    def row_ranges(self, variable: VariableSpec) -> list[Range]:
        return []

    @property
    def session_creation_timeout(self) -> float:
        return 0.0

    @property
    def input_context(self) -> InputContext:
        return InputContext()

    def scope(self) -> contextlib.AbstractContextManager[Strategy]:
        """Return a scope that changes nothing. Entering it inside another strategy's scope raises RuntimeError."""
        return context.NoScope(self)

    def prepare(self, model: M, optimizer: torch.optim.Optimizer) -> tuple[M, PreparedOptimizer]:
        raise _outside("prepare")

    def connect(self) -> ParameterClient:
        raise _outside("a variable")

    def place(self, variable: VariableSpec) -> int:
        raise _outside(f"variable {variable.name!r}")

    def distribute_values_from_function(self, fn: Callable[[ValueContext], T]) -> T:
        return fn(ValueContext())

    def activate(self, replica: int) -> None:
        """Do nothing: there is only one replica."""

    def __repr__(self) -> str:
        return "<the default strategy: one replica>"


class _DefaultReplicaContext(ReplicaContext):
    """The replica outside of all scopes: never entered, and always current."""

    def merge_call(self, fn: Callable[..., Any], args: Any = (), kwargs: Any = None) -> Any:
        return (
            self._merge(fn, tuple(args), dict(kwargs or {}))
            if context.current() is None
            else super().merge_call(fn, args, kwargs)
        )


@functools.cache
def _default() -> _DefaultStrategy:
    return _DefaultStrategy()


def _outside(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} lives on the parameter servers of a strategy: Need to be inside `with strategy.scope():`"
    )
