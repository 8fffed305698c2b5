"""A variable that is partitioned by rows: each part is a variable of its own, on a ps of its own."""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from paramserver.distribute.variables.plain import PlainVariable
from paramserver.distribute.variables.tensor_like import TensorLike
from paramserver.distribute.variables.variable import Assignment, Variable, here


class ShardedVariable(Variable):
    """A variable whose parts look like one variable of all rows; assigned to and indexed like one. See `Variable`.

    Rows are read and assigned part by part: assignments of other tasks may come in between. Iteration yields the parts.

    Args:
        variables: The parts, in the order of their rows.
        name: The name of the whole.

    Attributes:
        variables: The parts.

    Raises:
        TypeError: If there is no part, or a part is not a variable.
        ValueError: If the parts differ in dtype, or in the shape of a row.
    """

    def __init__(self, variables: Sequence[PlainVariable], name: str) -> None:
        first = _checked(variables, name)
        self.variables = tuple(variables)
        self.name, self.dtype, self.device, self.ps = name, first.dtype, first.device, first.ps
        self.trainable, self.aggregation, self.strategy = first.trainable, first.aggregation, first.strategy
        self._starts = [0, *itertools.accumulate(part.shape[0] for part in variables)]
        self.shape = torch.Size((self._starts[-1], *first.shape[1:]))

    def value(self) -> torch.Tensor:
        return torch.cat([part.value() for part in self.variables])

    def _apply(self, assignment: Assignment, value: torch.Tensor) -> torch.Tensor:
        results = [part._apply(assignment, value[rows.start : rows.stop]) for rows, part in self._parts()]
        return torch.cat(results)

    def __iter__(self) -> Iterator[PlainVariable]:
        return iter(self.variables)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> torch.Tensor:
        """Return a part of the value, indexed like an array; a row or a slice reads only the parts that it needs.

        Args:
            key: An int, a slice (its step may be negative), a mask of bools, ``...`` or None; or a tuple that begins
                with one of these and continues with any indices of a tensor.

        Raises:
            IndexError: If a row is out of range, or a mask has another shape.
            ValueError: If the step of a slice is 0.
            TypeError: If the key is anything else, such as a tensor or array of indices, also inside a slice. Use
                `sparse_read` for these.
        """
        first, *others = (key or (...,)) if isinstance(key, tuple) else (key,)
        if isinstance(first, slice):
            for bound in (first.start, first.stop, first.step):
                self._check_bound(bound)
            return self._slice(range(len(self))[first])[(slice(None), *others)]
        if first is Ellipsis or first is None or _is_mask(first):
            return self.value()[(_as_index(first), *others)]
        row = self._row(self._row_number(first))
        return row[tuple(others)] if others else row

    def _check_bound(self, bound: Any) -> None:
        if bound is not None and not _is_int(bound):
            raise TypeError(
                f"variable {self.name!r} is partitioned: expected ints in the slice of its rows, got a "
                f"{type(bound).__name__}; make it one with int()"
            )

    def _row_number(self, key: Any) -> int:
        if not _is_int(key):
            raise TypeError(
                f"variable {self.name!r} is partitioned: expected an int, a slice or a mask of bools as the index of "
                f"its rows, got {type(key).__name__}; see sparse_read"
            )
        row = operator.index(key)
        if not -len(self) <= row < len(self):
            raise IndexError(f"variable {self.name!r} has {len(self)} rows, got index {row}")
        return row % len(self)

    def _row(self, row: int) -> torch.Tensor:
        part = bisect_right(self._starts, row) - 1
        local = row - self._starts[part]
        return self.variables[part].rows(local, local + 1)[0]

    def _slice(self, wanted: range) -> torch.Tensor:
        """Return a range of rows in its order. The parts are read in ascending order, each at most once."""
        ascending = wanted if wanted.step > 0 else wanted[::-1]
        read = [_rows(part, rows, ascending) for rows, part in self._parts() if _inside(ascending, rows)]
        if not read:
            return here(torch.empty(0, *self.shape[1:], dtype=self.dtype, device="cpu"))
        values = torch.cat(read)
        return values if wanted.step > 0 else values.flip(0)

    def _parts(self) -> Iterator[tuple[range, PlainVariable]]:
        for (start, stop), part in zip(itertools.pairwise(self._starts), self.variables, strict=True):
            yield range(start, stop), part

    def __repr__(self) -> str:
        whole = super().__repr__()[1:-1].partition(" on ")[0]
        return f"<{whole} in {len(self.variables)} parts on {', '.join(part.device for part in self.variables)}>"


def _checked(variables: Sequence[PlainVariable], name: str) -> PlainVariable:
    if not variables or not all(isinstance(part, PlainVariable) for part in variables):
        raise TypeError(
            f"variable {name!r}: expected at least one part, and variables only, got "
            f"[{', '.join(type(part).__name__ for part in variables)}]"
        )
    first = variables[0]
    for part in variables:
        if part.dtype is not first.dtype or not first.shape or part.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"variable {name!r}: its parts may differ in the number of rows only, got {first!r} and {part!r}"
            )
    return first


def _inside(wanted: range, rows: range) -> range:
    """Return the part of an ascending range that is inside ``rows``."""
    first, last = (max(-((wanted.start - bound) // wanted.step), 0) for bound in (rows.start, rows.stop))
    return wanted[first:last]


def _rows(part: PlainVariable, rows: range, wanted: range) -> torch.Tensor:
    inside = _inside(wanted, rows)
    return part.rows(inside[0] - rows.start, inside[-1] + 1 - rows.start)[:: wanted.step]


def _is_int(key: Any) -> bool:
    """Return whether a key is the program's own number, not a tensor: reading a tensor could block on its device."""
    return hasattr(key, "__index__") and not isinstance(key, (torch.Tensor, TensorLike, np.ndarray, bool))


def _is_mask(key: Any) -> bool:
    if isinstance(key, list):
        return bool(key) and all(isinstance(each, (bool, np.bool_)) for each in key)
    return getattr(key, "dtype", None) in (torch.bool, np.bool_) and key.ndim > 0


def _as_index(key: Any) -> Any:
    return key if key is Ellipsis or key is None or isinstance(key, torch.Tensor) else torch.as_tensor(np.array(key))
