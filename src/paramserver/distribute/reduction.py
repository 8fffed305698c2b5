"""Reduce: many values into one."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paramserver.distribute.strategy import Strategy


class ReduceOp(enum.Enum):
    """How values are combined."""

    SUM = "SUM"
    MEAN = "MEAN"

    @classmethod
    def parse(cls, op: str | ReduceOp) -> ReduceOp:
        """An op by name, in any case.

        >>> ReduceOp.parse("mean")
        <ReduceOp.MEAN: 'MEAN'>

        Raises:
            ValueError: If there is no such op.
            TypeError: If it is no name.
        """
        if isinstance(op, ReduceOp):
            return op
        if not isinstance(op, str):
            raise TypeError(f"reduce: op must be 'sum', 'mean' or a ReduceOp, got {type(op).__name__}")
        try:
            return cls(op.upper())
        except ValueError:
            raise ValueError(f"reduce: unknown op {op!r}; expected 'sum' or 'mean'") from None


Destinations = Any
"""A device's name, a variable, a tensor or a distributed value: where the result is to be."""


def reduce(strategy: Strategy, op: str | ReduceOp, value: Any, axis: int | Sequence[int] | None) -> Any:
    raise NotImplementedError


def reduce_to(strategy: Strategy, op: str | ReduceOp, value: Any, destinations: Destinations) -> Any:
    raise NotImplementedError


def batch_reduce_to(strategy: Strategy, op: str | ReduceOp, pairs: Sequence[tuple[Any, Destinations]]) -> list[Any]:
    raise NotImplementedError


def broadcast_to(strategy: Strategy, value: Any, destinations: Destinations) -> Any:
    raise NotImplementedError


def gather(strategy: Strategy, value: Any, axis: int) -> Any:
    raise NotImplementedError


def gather_to(strategy: Strategy, value: Any, destinations: Destinations, axis: int) -> Any:
    raise NotImplementedError
