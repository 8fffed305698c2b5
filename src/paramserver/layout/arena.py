"""Arenas: many variables of one dtype and one optimizer group in one contiguous block of memory.

Rules
    * A layout says where each variable lies. Worker and ps compute it from the same layout, so an offset means
      the same thing on both sides and nothing per variable has to travel.
    * A variable starts at a multiple of `ALIGNMENT` bytes, so that matrix kernels find their alignment. The gap
      before it belongs to nobody; its gradient is zero for ever.
    * A *table* is a variable whose rows are pulled and pushed one by one: it has an arena to itself, and workers have
      no memory for it.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import torch

from paramserver.layout.blocks import Range, pieces
from paramserver.layout.rules import Rule
from paramserver.layout.variables import DTYPES, VariableSpec

ALIGNMENT = 64


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
