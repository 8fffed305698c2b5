"""Rows of a table in memory, copied by their ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FETCHED = 1024
"""Rows that are brought into the cache together before they are copied: copies wait for one row after the other."""

Ids = npt.NDArray[np.int64]


class Rows:
    """The rows of a table, copied many at a time.

    On the CPU a row is one item to NumPy, whatever it holds, which copies single rows about twice as fast as torch's
    index functions do. Not thread-safe.

    Args:
        table: ``[rows, width]``, contiguous.
        in_cache: Whether its rows are likely to be in the cache, so that many need not be brought there before.

    Example:
        >>> rows = Rows(torch.arange(6).view(3, 2))
        >>> rows.put(np.array([0]), torch.tensor([[7, 7]]))
        >>> rows.take(np.array([0, 2])).tolist()
        [[7, 7], [4, 5]]
    """

    def __init__(self, table: Tensor, *, in_cache: bool = False) -> None:
        self._table = table
        self._in_cache = in_cache
        self._items = _items(table) if table.device.type == "cpu" and table.numel() else None

    def take(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        """A copy ``[ids, width]`` of the rows ``ids [ids]``, which must be there; into ``out`` if it is given."""
        if out is None:
            out = self._table.new_empty(len(ids), self._table.shape[1])
        if self._items is None:
            return torch.index_select(self._table, 0, on_device(ids, self._table), out=out)
        if len(ids) > FETCHED and not self._in_cache:
            _fetch_and_copy(self._items, ids, _items(out))
        elif len(ids):
            self._items.take(ids, out=_items(out), mode="clip")  # "raise" makes a copy first
        return out

    def put(self, ids: Ids, values: Tensor) -> None:
        """Make ``values [ids, width]`` the rows ``ids [ids]``, which must be there.

        Raises:
            ValueError: If the values are not of the table's width and dtype, or not as many as the ids.
        """
        if values.shape != (len(ids), self._table.shape[1]) or values.dtype is not self._table.dtype:
            raise ValueError(
                f"putting {len(ids)} rows of {self._table.shape[1]} elements of {self._table.dtype}: "
                f"got {tuple(values.shape)} of {values.dtype}"
            )
        if self._items is None:
            self._table.index_copy_(0, on_device(ids, self._table), values)
        elif len(ids):
            np.put(self._items, ids, _items(values.contiguous()), mode="wrap")  # "clip" takes a tenth longer


def on_device(ids: Ids, beside: Tensor) -> Tensor:
    """The ids as torch takes them, on the device of ``beside``; the same memory where that is the CPU."""
    return torch.from_numpy(ids).to(beside.device)


def _fetch_and_copy(items: npt.NDArray[np.void], ids: Ids, out: npt.NDArray[np.void]) -> None:
    data = items.view(np.uint8)
    for first in range(0, len(ids), FETCHED):
        some = ids[first : first + FETCHED]
        data.take(some * items.itemsize, mode="wrap")  # a byte of each: these need not wait for one another
        items.take(some, out=out[first : first + FETCHED], mode="clip")


def _items(table: Tensor) -> npt.NDArray[np.void]:
    """The rows as items of as many bytes; not empty."""
    flat = table.detach().view(-1).view(torch.uint8).numpy()
    return flat.view(f"V{table.shape[1] * table.itemsize}")
