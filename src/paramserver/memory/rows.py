"""Rows of a table in memory, copied by their ids."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FETCHED = 1024
"""Number of rows that are brought into the cache together before copying, because a copy waits for each row in turn."""

LARGE = 32 << 20
"""Size of a table in bytes from which on its rows are rarely in a cache, so that compiled loops are worth compiling."""

Ids = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)


def loops_for(nbytes: int, dtype: torch.dtype) -> ModuleType | None:
    """Return `row_loops` for a table of ``nbytes`` bytes if it is large, and numba is installed and knows its dtype.

    The first call takes a few tenths of a second, and so does the first call of each loop.
    """
    return _row_loops() if nbytes >= LARGE and dtype in (torch.float32, torch.float64) else None


@functools.cache
def _row_loops() -> ModuleType | None:
    try:
        from paramserver.memory import row_loops
    except ImportError as error:
        logger.info("a large table is updated in several passes; the extra 'numba' makes that one (%s)", error)
        return None
    return row_loops


class Rows:
    """The rows of a table, copied many at a time.

    On the CPU, NumPy handles a row as one item of any content; it copies single rows about twice as fast as torch's
    index functions. Rows of a large table are copied by a compiled loop, if there is one. Not thread-safe.

    Args:
        table: ``[rows, width]``, contiguous.
        in_cache: Whether the rows are probably in the cache, so that they need not be brought there before copying.

    Attributes:
        table: The table.
        loops: The compiled loops; see `loops_for`.
        elements: The elements of the table for these loops; None without loops.

    Example:
        >>> rows = Rows(torch.arange(6).view(3, 2))
        >>> rows.put(np.array([0]), torch.tensor([[7, 7]]))
        >>> rows.take(np.array([0, 2])).tolist()
        [[7, 7], [4, 5]]
    """

    def __init__(self, table: Tensor, *, in_cache: bool = False) -> None:
        self.table = table
        self._in_cache = in_cache
        self._items = _items(table) if table.device.type == "cpu" and table.numel() else None
        self.loops = loops_for(table.nbytes, table.dtype) if self._items is not None and not in_cache else None
        self.elements = flat(table) if self.loops else None

    def take(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        """Return a copy ``[ids, width]`` of the rows ``ids [ids]``, which must exist; into ``out`` if it is given."""
        if out is None:
            out = self.table.new_empty(len(ids), self.table.shape[1])
        if self.loops:
            self.loops.gather(self.elements, ids.view(np.uint64), np.uint64(out.shape[1]), flat(out))
            return out
        if self._items is None:
            return torch.index_select(self.table, 0, on_device(ids, self.table), out=out)
        if len(ids) > FETCHED and not self._in_cache:
            _fetch_and_copy(self._items, ids, _items(out))
        elif len(ids):
            self._items.take(ids, out=_items(out), mode="clip")  # "raise" makes a copy first
        return out

    def put(self, ids: Ids, values: Tensor) -> None:
        """Replace the rows ``ids [ids]``, which must exist, by ``values [ids, width]``.

        Raises:
            ValueError: If the values have another width or dtype than the table, or another number of rows than the
                ids.
        """
        if values.shape != (len(ids), self.table.shape[1]) or values.dtype is not self.table.dtype:
            raise ValueError(
                f"putting {len(ids)} rows of {self.table.shape[1]} elements of {self.table.dtype}: "
                f"got {tuple(values.shape)} of {values.dtype}"
            )
        if self._items is None:
            self.table.index_copy_(0, on_device(ids, self.table), values)
        elif len(ids):
            np.put(self._items, ids, _items(values.contiguous()), mode="wrap")  # "clip" takes a tenth longer


def add_up(rows: Tensor, places: Ids, numbers: Ids, loops: ModuleType | None = None) -> Tensor:
    """Return sums ``[sums, width]`` of rows, each computed by adding one row after the other.

    Args:
        rows: The rows to choose from, ``[..., width]``; they are counted from the first to the last.
        places: The rows to add up, in this order ``[places]``.
        numbers: The sum that each of them belongs to ``[places]``; ascending from 0 without gaps.
        loops: The compiled loops; see `loops_for`.
    """
    width = rows.shape[-1]
    if loops:
        sums = rows.new_empty(int(numbers[-1]) + 1 if len(numbers) else 0, width)
        loops.add_up(*_with_gaps(rows), places.view(np.uint64), numbers.view(np.uint64), np.uint64(width), flat(sums))
        return sums
    rows = rows.reshape(-1, width)
    is_again = np.zeros(len(numbers), dtype=bool)
    np.equal(numbers[1:], numbers[:-1], out=is_again[1:])
    taken = Rows(rows.contiguous(), in_cache=True)
    sums, repeated = taken.take(places[~is_again]), on_device(numbers[is_again], rows)
    return sums.index_add_(0, repeated, taken.take(places[is_again]))


def _with_gaps(rows: Tensor) -> tuple[npt.NDArray[np.floating], np.uint64, np.uint64]:
    """Return the elements of rows ``[..., width]``, the number of rows between gaps, and the elements of a gap."""
    if rows.dim() == 3 and rows.numel() and rows.stride()[1:] == (rows.shape[2], 1):
        together = rows.shape[1] * rows.shape[2]
        if (gap := rows.stride(0) - together) >= 0:
            elements = rows.detach().as_strided(((len(rows) - 1) * rows.stride(0) + together,), (1,))
            return elements.numpy(), np.uint64(rows.shape[1]), np.uint64(gap)
    return flat(rows.contiguous()), np.uint64(max(rows.numel(), 1)), np.uint64(0)


def flat(rows: Tensor) -> npt.NDArray[np.floating]:
    """Return the elements of rows as a flat array over the same memory."""
    return rows.detach().view(-1).numpy()


def on_device(ids: Ids, beside: Tensor) -> Tensor:
    """Return ids as a tensor on the device of ``beside``; over the same memory on the CPU."""
    return torch.from_numpy(ids).to(beside.device)


def _fetch_and_copy(items: npt.NDArray[np.void], ids: Ids, out: npt.NDArray[np.void]) -> None:
    data = items.view(np.uint8)
    for first in range(0, len(ids), FETCHED):
        some = ids[first : first + FETCHED]
        data.take(some * items.itemsize, mode="wrap")  # one byte of each row: these reads overlap, unlike copies
        items.take(some, out=out[first : first + FETCHED], mode="clip")


def _items(table: Tensor) -> npt.NDArray[np.void]:
    """Return the rows as items with as many bytes; the table must not be empty."""
    flat = table.detach().view(-1).view(torch.uint8).numpy()
    return flat.view(f"V{table.shape[1] * table.itemsize}")
