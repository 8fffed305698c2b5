"""Blocks: the units in which an arena is locked, updated, sent, and checked for torn reads.

Rules
    * A block has `BLOCK` elements: large enough that the cost of Python does not matter, small enough to stay in a
      processor's cache and to bound every buffer.
    * A *range* ``[start, stop)`` counts elements of an arena. A *piece* is a range inside one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 19
ID_BYTES = 8
ROWS_PER_BLOCK = 16
"""Number of rows for each block from which on finding the touched blocks takes longer than it saves."""


Range = tuple[int, int]


def num_blocks(size: int) -> int:
    """Return the number of blocks of an arena of ``size`` elements."""
    return -(-size // BLOCK)


def blocks_of_rows(ids: npt.NDArray[np.int64], width: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the blocks in which rows of ``width`` elements begin and, if rows can cross a boundary, in which they end.

    >>> first, last = blocks_of_rows(np.array([0, 1, 2]), BLOCK - 1)
    >>> first.tolist(), last.tolist()
    ([0, 0, 1], [0, 1, 2])
    """
    if BLOCK % width == 0:
        return (ids // (BLOCK // width),)
    return ids * width // BLOCK, ((ids + 1) * width - 1) // BLOCK


def touched_blocks(ids: npt.NDArray[np.int64], width: int, count: int) -> npt.NDArray[np.int64]:
    """Return the blocks, of ``count``, in which rows of ``width`` elements lie, ascending; all if there are many rows.

    >>> touched_blocks(np.array([5, 1, 5]), BLOCK, count=8).tolist()
    [1, 5]
    """
    if len(ids) > ROWS_PER_BLOCK * count:
        return np.arange(count)
    is_touched = np.zeros(count, dtype=bool)
    for blocks in blocks_of_rows(ids, width):
        is_touched[blocks] = True
    return np.flatnonzero(is_touched)


def pieces(ranges: Sequence[Range]) -> Iterator[Range]:
    """Yield the ranges cut at block boundaries, in order.

    >>> list(pieces([(5, 10), (BLOCK - 1, BLOCK + 1)])) == [(5, 10), (BLOCK - 1, BLOCK), (BLOCK, BLOCK + 1)]
    True
    """
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // BLOCK + 1) * BLOCK)
            yield start, end
            start = end


def join_ranges(ranges: Sequence[Range], gap: int) -> tuple[Range, ...]:
    """Join neighbours of sorted ranges that are at most ``gap`` elements apart.

    >>> join_ranges([(0, 6), (16, 18), (64, 80)], gap=15)
    ((0, 18), (64, 80))
    """
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
