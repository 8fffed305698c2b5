"""Variables: named states that all workers share, and the parts of variables partitioned by rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import msgspec
import torch

from paramserver.errors import ConfigError

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


Extent = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
"""A number of rows, or of elements along one dimension."""
MAX_DIMENSIONS = 64
"""Limit of torch."""


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """The rows of a partitioned variable that one part holds: ``[start, start + rows of the part)``."""

    variable: str
    """The name of the whole variable."""
    index: Extent
    start: Extent
    rows: Extent
    """Rows of the whole variable."""


class VariableSpec(msgspec.Struct, frozen=True, array_like=True):
    """A named state, with all that has to be equal on every worker that shares it.

    A part of a partitioned variable is a variable of its own, called ``NAME/part_I``; ``shard`` names the whole
    variable.
    """

    name: str
    shape: Annotated[tuple[Extent, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    dtype: str
    shard: Shard | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def shown(dtype: str | torch.dtype, shape: Iterable[int]) -> str:
    """Return a dtype and a shape as messages show them.

    >>> shown(torch.float32, (2, 3))
    'float32[2, 3]'
    """
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def dtype_name(dtype: torch.dtype, variable: str) -> str:
    """Return the name of a dtype in messages.

    Raises:
        ConfigError: If a ps cannot hold variables of this dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"variable {variable!r} has dtype {name}, which a parameter server cannot hold; "
            f"expected one of {', '.join(DTYPES)}"
        )
    return name
