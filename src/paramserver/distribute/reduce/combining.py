"""The arithmetic of reductions: several tensors become one.

Rules
    * Numbers are treated as tensors, truth values as 0 and 1.
    * Sparse tensors (``sparse_coo``) stay sparse: their indices and values are concatenated, and an index that occurs
      twice means the sum of both values.
    * Nothing is broadcast: the values to combine have one shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

NUMBERS = (bool, int, float, complex, np.generic, np.ndarray)


def as_tensor(value: Any) -> torch.Tensor:
    """Return a replica's value as a tensor.

    Raises:
        TypeError: If the value is neither a tensor nor a number.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, NUMBERS):
        return torch.tensor(value)
    raise TypeError(f"a value of a replica must be a tensor or a number to be combined with others, got {value!r}")


def add_all(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of tensors ``[...]`` on one device; sparse ones are concatenated, without merging duplicates.

    >>> add_all([torch.ones(2), torch.ones(2)])
    tensor([2., 2.])

    Raises:
        ValueError: If the shapes differ, or some tensors are sparse and some are not.
    """
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        raise ValueError(
            f"reduce: the values of the replicas must have one shape, got {_shapes(tensors)}; "
            "combine what differs in size with axis=, or with gather"
        )
    if any(tensor.layout is not first.layout for tensor in tensors):
        raise ValueError("reduce: some replicas have a sparse value and some a dense one; expected one kind")
    if first.layout is torch.sparse_coo:
        return _concatenated_sparse(tensors)
    # In torch True + True is True, but here it must be 2.
    return functools.reduce(torch.add, tensors[1:], first.long() if first.dtype is torch.bool else first)


def sum_inside(tensor: torch.Tensor, axes: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """Return the sum of a dense tensor over axes, and the number of its values in each sum.

    >>> sum_inside(torch.ones(2, 3), (0,))
    (tensor([2., 2., 2.]), 2)

    Raises:
        ValueError: If an axis is out of range, or occurs twice.
        NotImplementedError: For a sparse tensor.
    """
    if tensor.layout is not torch.strided:
        raise NotImplementedError("reduce: an axis of a sparse tensor cannot be combined; pass axis=None")
    inside = _in_rank(tensor, axes)
    return tensor.sum(inside), math.prod(tensor.shape[axis] for axis in inside)


def concatenate(tensors: Sequence[torch.Tensor], axis: int, device: torch.device) -> torch.Tensor:
    """Concatenate dense tensors on one device.

    Raises:
        ValueError: If their shapes differ along other axes, and as `check_gatherable`.
        NotImplementedError: As `check_gatherable`.
        TypeError: As `check_gatherable`.
    """
    for tensor in tensors:
        check_gatherable(tensor, axis)
    others = {(*tensor.shape[:axis], *tensor.shape[axis:][1:]) for tensor in tensors}
    if len(others) > 1:
        raise ValueError(f"gather: shapes may differ along axis {axis} only, got {_shapes(tensors)}")
    return torch.cat([tensor.to(device) for tensor in tensors], axis)


def check_gatherable(tensor: torch.Tensor, axis: int) -> None:
    """Check that a tensor can be concatenated with others.

    Raises:
        NotImplementedError: If the tensor is sparse.
        ValueError: If the tensor has no axes, or the axis is out of range.
        TypeError: If the axis is not an int.
    """
    if tensor.layout is not torch.strided:
        raise NotImplementedError("gather: sparse tensors are not supported; gather their indices and values instead")
    if not tensor.ndim:
        raise ValueError("gather: a tensor without axes cannot be concatenated; expected one of rank 1 or more")
    if not _is_axis(axis):
        raise TypeError(f"gather: axis must be an int, got {axis!r}")
    _in_rank(tensor, (axis,))


def as_axes(axis: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return a program's axes as a tuple; empty for None.

    Raises:
        TypeError: If the value is neither an int nor a list or tuple of ints.
    """
    axes = () if axis is None else tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
    if not all(map(_is_axis, axes)):
        raise TypeError(f"axis must be an int or a list or tuple of ints, got {axis!r}")
    return axes


def _is_axis(axis: object) -> bool:
    return isinstance(axis, int) and not isinstance(axis, bool)


def _in_rank(tensor: torch.Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes counted from the start."""
    rank = tensor.ndim
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(f"axis {axis} is out of range for value with rank {rank}")
    counted = tuple(axis % rank for axis in axes)
    if len(set(counted)) < len(counted):
        raise ValueError(f"axis {axes} names an axis of a value with rank {rank} twice")
    return counted


def _concatenated_sparse(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        torch.cat([tensor._indices() for tensor in tensors], dim=1),
        torch.cat([tensor._values() for tensor in tensors]),
        tensors[0].shape,
        check_invariants=False,  # the program chose whether to check each tensor when it was made
    )


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)
