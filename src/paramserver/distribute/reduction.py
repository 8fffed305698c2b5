"""Reduce: many values into one."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch


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


def reduce(op: str | ReduceOp, value: torch.Tensor, axis: int | Sequence[int] | None) -> torch.Tensor:
    """One replica's value, combined over ``axis``."""
    combine = torch.sum if ReduceOp.parse(op) is ReduceOp.SUM else torch.mean
    if axis is None:
        return value
    value = torch.as_tensor(value)
    return combine(value, dim=_axes(axis, value.dim()))


def _axes(axis: int | Sequence[int], rank: int) -> list[int]:
    axes = [axis] if isinstance(axis, int) else axis
    if not isinstance(axes, (list, tuple)) or not all(isinstance(a, int) for a in axes):
        raise TypeError(f"reduce: axis must be an int or a list or tuple of ints, got {axis!r}")
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(f"reduce: axis {a} is out of range for value with rank {rank}")
    return list(axes)
