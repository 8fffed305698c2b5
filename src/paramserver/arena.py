"""Arenas: many variables of one dtype and one optimizer group in one contiguous block of memory.

Rules
    * A layout says where each variable lies. Worker and ps compute it from the same layout, so an offset means
      the same thing on both sides and nothing per variable has to travel.
    * A variable starts at a multiple of `ALIGNMENT` bytes, so that matrix kernels find their alignment. The gap
      before it belongs to nobody; its gradient is zero for ever.
    * An arena is divided into *blocks* of `BLOCK` elements. A block is what is locked, updated, sent and checked
      for torn reads in one go: large enough that Python does not show, small enough to stay in a cache and to
      bound every buffer. A *range* ``[start, stop)`` counts elements; a *piece* is a range inside one block.
    * A *table* is a variable whose rows are pulled and pushed one by one: it has an arena to itself, and workers have
      no memory for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from paramserver.errors import ConfigError
from paramserver.rules import Rule

ALIGNMENT = 64
BLOCK = 1 << 19
ID_BYTES = 8
ROWS_PER_BLOCK = 16
"""Rows for each block from which on it takes longer to find out which blocks they lie in than it is worth."""

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}

Range = tuple[int, int]


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """Which rows of a partitioned variable a part of it holds: ``[start, start + rows of the part)``."""

    variable: str
    """The name of the whole variable."""
    index: int
    start: int
    rows: int
    """Rows of the whole variable."""


class VariableSpec(msgspec.Struct, frozen=True, array_like=True):
    """A named state: what has to be equal on every worker that shares it.

    A part of a partitioned variable is a variable like others, called ``NAME/part_I``; ``shard`` says what of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: Shard | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class ArenaLayout(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """Which variables lie in one arena, in which order, and the rule that updates them (None: none does).

    ``is_table``: it holds one variable, a table.

    >>> variables = (VariableSpec("w", (3, 2), "float32"), VariableSpec("b", (2,), "float32"))
    >>> layout = ArenaLayout("float32", None, variables)
    >>> layout.offsets, layout.size, layout.nbytes
    ((0, 16), 18, 72)
    """

    dtype: str
    rule: Rule | None
    variables: tuple[VariableSpec, ...]
    is_table: bool = False

    @property
    def on_worker(self) -> ArenaLayout:
        """What a worker has memory for."""
        return ArenaLayout(self.dtype, None, ()) if self.is_table else self

    @cached_property
    def table_shape(self) -> tuple[int, int]:
        """Rows of a table, and elements of each."""
        rows = self.variables[0].shape[0]
        return rows, self.size // max(rows, 1)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first element of each variable."""
        step = ALIGNMENT // self.itemsize
        offsets, end = [], 0
        for variable in self.variables:
            offsets.append(-(-end // step) * step)
            end = offsets[-1] + variable.size
        return tuple(offsets)

    @cached_property
    def size(self) -> int:
        """The number of elements, gaps included."""
        return self.offsets[-1] + self.variables[-1].size if self.variables else 0

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of all its variables."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena."""
        return self.size * self.itemsize

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """The range of each variable, without the gaps."""
        return tuple(
            (start, start + variable.size) for start, variable in zip(self.offsets, self.variables, strict=True)
        )

    def gap_end(self, stop: int) -> int:
        """Where the gap behind a variable that ends at ``stop`` ends: where the next one may begin.

        >>> one, other = VariableSpec("b", (2,), "float32"), VariableSpec("c", (), "float32")
        >>> ArenaLayout("float32", None, (one, other)).gap_end(2)
        16
        """
        step = ALIGNMENT // self.itemsize
        return min(-(-stop // step) * step, self.size)

    @cached_property
    def pieces(self) -> tuple[Range, ...]:
        """The whole arena, block by block."""
        return tuple(pieces([(0, self.size)]))

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of each variable's shape for each variable, all of them views of ``flat``."""
        return [
            flat[start:stop].view(variable.shape)
            for (start, stop), variable in zip(self.ranges, self.variables, strict=True)
        ]


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Its descriptor."""


@dataclass(frozen=True)
class StoreMemory:
    """Where a ps keeps the values of its arenas.

    Attributes:
        values: A flat tensor for each arena.
        versions: For each arena one counter for each block: odd while the block is written, two more after.
        file: The file that other processes can map, if there is one; it stays open for as long as this object lives.
    """

    values: list[torch.Tensor]
    versions: list[npt.NDArray[np.uint64]]
    file: HasFileno | None = None


def dtype_name(dtype: torch.dtype, variable: str) -> str:
    """The name under which a dtype travels.

    Raises:
        ConfigError: If variables of this dtype cannot live on a ps.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"variable {variable!r} has dtype {name}, which a parameter server cannot hold; "
            f"expected one of {', '.join(DTYPES)}"
        )
    return name


def num_blocks(size: int) -> int:
    """How many blocks an arena of ``size`` elements has."""
    return -(-size // BLOCK)


def blocks_of_rows(ids: npt.NDArray[np.int64], width: int) -> tuple[npt.NDArray[np.int64], ...]:
    """The blocks in which rows of ``width`` elements begin, and those in which they end if some end in another.

    >>> first, last = blocks_of_rows(np.array([0, 1, 2]), BLOCK - 1)
    >>> first.tolist(), last.tolist()
    ([0, 0, 1], [0, 1, 2])
    """
    if BLOCK % width == 0:
        return (ids // (BLOCK // width),)
    return ids * width // BLOCK, ((ids + 1) * width - 1) // BLOCK


def touched_blocks(ids: npt.NDArray[np.int64], width: int, count: int) -> npt.NDArray[np.int64]:
    """Which of so many blocks rows of ``width`` elements lie in, ascending; all, if there are many rows.

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
    """The ranges, cut at block boundaries, in order.

    >>> list(pieces([(5, 10), (BLOCK - 1, BLOCK + 1)])) == [(5, 10), (BLOCK - 1, BLOCK), (BLOCK, BLOCK + 1)]
    True
    """
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // BLOCK + 1) * BLOCK)
            yield start, end
            start = end


def merge(ranges: Sequence[Range], gap: int) -> tuple[Range, ...]:
    """The sorted ranges, neighbours that are at most ``gap`` elements apart made one.

    >>> merge([(0, 6), (16, 18), (64, 80)], gap=15)
    ((0, 18), (64, 80))
    """
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, to be sent from or received into."""
    return tensor.view(-1).view(torch.uint8).numpy().data
