"""Arenas: many variables of one dtype and one optimizer group in one contiguous block of memory.

Rules
    * A layout says where each variable lies. Worker and ps compute this from the same layout, so an offset means the
      same on both sides, and nothing has to be sent per variable.
    * A variable starts at a multiple of `ALIGNMENT` bytes, as matrix kernels need it. The gap before it belongs to no
      variable; its gradient is always zero.
    * A *table* is a variable whose rows are pulled and pushed one by one. It has an arena of its own, and workers have
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
    """The variables of one arena, in their order, and the rule that updates them (None: no rule does).

    ``is_table``: the arena holds one variable, which is a table.

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
        """The layout of the memory that a worker has for this arena; empty for a table."""
        return ArenaLayout(self.dtype, None, ()) if self.is_table else self

    @cached_property
    def table_shape(self) -> tuple[int, int]:
        """Number of rows of a table, and number of elements of a row."""
        rows = self.variables[0].shape[0]
        return rows, self.size // max(rows, 1)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First element of each variable."""
        step = ALIGNMENT // self.itemsize
        offsets, end = [], 0
        for variable in self.variables:
            offsets.append(-(-end // step) * step)
            end = offsets[-1] + variable.size
        return tuple(offsets)

    @cached_property
    def size(self) -> int:
        """Number of elements, including the gaps."""
        return self.offsets[-1] + self.variables[-1].size if self.variables else 0

    @cached_property
    def itemsize(self) -> int:
        """Size of one element in bytes."""
        return DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of all variables of the arena."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size of the whole arena in bytes."""
        return self.size * self.itemsize

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """Range of each variable, without the gaps."""
        return tuple(
            (start, start + variable.size) for start, variable in zip(self.offsets, self.variables, strict=True)
        )

    def gap_end(self, stop: int) -> int:
        """Return the end of the gap behind a variable that ends at ``stop``, where the next variable may begin.

        >>> one, other = VariableSpec("b", (2,), "float32"), VariableSpec("c", (), "float32")
        >>> ArenaLayout("float32", None, (one, other)).gap_end(2)
        16
        """
        step = ALIGNMENT // self.itemsize
        return min(-(-stop // step) * step, self.size)

    @cached_property
    def pieces(self) -> tuple[Range, ...]:
        """Range of each block of the arena, in order."""
        return tuple(pieces([(0, self.size)]))

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return a view of ``flat`` for each variable, in the variable's shape."""
        return [
            flat[start:stop].view(variable.shape)
            for (start, stop), variable in zip(self.ranges, self.variables, strict=True)
        ]
