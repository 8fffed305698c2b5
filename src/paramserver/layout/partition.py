"""The division of variables into parts by rows. Pure functions of shape and dtype.

Rules
    * A partitioner returns the number of partitions of a variable along each axis, such as ``[4, 1]``; only the first
      axis may be divided.
    * Every part has at least one row. The sizes of the parts differ by one row at most, larger parts come first.
    * A scalar, and a variable of one part, stays whole: it is not partitioned at all.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence

from paramserver.errors import ConfigError
from paramserver.layout.blocks import Range
from paramserver.layout.variables import DTYPES, Shard, VariableSpec

Partitioner = Callable[[tuple[int, ...], str], Sequence[int]]
"""Function from a variable's shape and dtype (``"float32"``) to the number of its partitions along each axis."""


class FixedShards:
    """The same number of parts for every variable, but at most one part for each row.

    Args:
        num_shards: Number of parts.

    Raises:
        ConfigError: If ``num_shards`` is not positive.

    >>> FixedShards(2)((10, 3), "float32"), FixedShards(4)((3,), "float32")
    ([2, 1], [3])
    """

    def __init__(self, num_shards: int) -> None:
        self._num_shards = _positive(num_shards, "FixedShards", "num_shards")

    def __call__(self, shape: tuple[int, ...], dtype: str) -> list[int]:
        """See `Partitioner`.

        Raises:
            ConfigError: For a scalar, which has no rows.
        """
        return _along_rows(shape, self._num_shards)

    def __repr__(self) -> str:
        return f"FixedShards({self._num_shards})"


class MinSize:
    """As many parts as possible, none of them smaller than a size.

    Args:
        min_shard_bytes: Minimum size of a part in bytes.
        max_shards: Maximum number of parts; the default of 1 divides nothing.

    Raises:
        ConfigError: If an argument is not positive.

    >>> MinSize(4, max_shards=2)((6, 1), "float32"), MinSize(4, max_shards=10)((6, 1), "float32")
    ([2, 1], [6, 1])
    >>> MinSize(max_shards=10)((6, 1), "float32")
    [1, 1]
    """

    def __init__(self, min_shard_bytes: int = 256 << 10, max_shards: int = 1) -> None:
        self._min_shard_bytes = _positive(min_shard_bytes, "MinSize", "min_shard_bytes")
        self._max_shards = _positive(max_shards, "MinSize", "max_shards")

    def __call__(self, shape: tuple[int, ...], dtype: str) -> list[int]:
        """See `Partitioner`.

        Raises:
            ConfigError: For a scalar, which has no rows.
        """
        least_rows = -(-self._min_shard_bytes // _row_bytes(shape, dtype))
        return _along_rows(shape, min(self._max_shards, shape[0] // least_rows))

    def __repr__(self) -> str:
        return f"MinSize({self._min_shard_bytes}, max_shards={self._max_shards})"


class MaxSize:
    """As few parts as possible, none of them larger than a size, or than one row.

    Args:
        max_shard_bytes: Maximum size of a part in bytes.
        max_shards: Maximum number of parts, which may then be larger than that; None for any number.

    Raises:
        ConfigError: If an argument is not positive.

    >>> MaxSize(4)((6, 1), "float32"), MaxSize(4, max_shards=2)((6, 1), "float32"), MaxSize(1024)((6, 1), "float32")
    ([6, 1], [2, 1], [1, 1])
    """

    def __init__(self, max_shard_bytes: int, max_shards: int | None = None) -> None:
        self._max_shard_bytes = _positive(max_shard_bytes, "MaxSize", "max_shard_bytes")
        self._max_shards = None if max_shards is None else _positive(max_shards, "MaxSize", "max_shards")

    def __call__(self, shape: tuple[int, ...], dtype: str) -> list[int]:
        """See `Partitioner`.

        Raises:
            ConfigError: For a scalar, which has no rows.
        """
        most_rows = max(self._max_shard_bytes // _row_bytes(shape, dtype), 1)
        num_shards = -(-shape[0] // most_rows)
        return _along_rows(shape, min(num_shards, self._max_shards or num_shards))

    def __repr__(self) -> str:
        return f"MaxSize({self._max_shard_bytes}, max_shards={self._max_shards})"


def row_ranges(partitioner: Partitioner, spec: VariableSpec) -> list[Range]:
    """Return the rows of each part of a variable; an empty list for a variable that stays whole.

    Raises:
        ConfigError: If the partitioner returns an impossible partition; the message names the variable.

    >>> row_ranges(FixedShards(4), VariableSpec("table", (10, 2), "float32"))
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    >>> row_ranges(FixedShards(4), VariableSpec("scale", (), "float32"))
    []
    """
    if not spec.shape:
        return []
    num_shards = min(_num_shards(partitioner, spec), spec.shape[0])
    if num_shards <= 1:
        return []
    rows, larger = divmod(spec.shape[0], num_shards)
    starts = [index * rows + min(index, larger) for index in range(num_shards + 1)]
    return list(itertools.pairwise(starts))


def item_bytes(dtype: str) -> int:
    """Return the size of one element in bytes.

    Raises:
        ConfigError: If a ps cannot hold this dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"the size of an element of {dtype!r} is not known; expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype].itemsize


def _num_shards(partitioner: Partitioner, spec: VariableSpec) -> int:
    answer: object = partitioner(spec.shape, spec.dtype)
    counts = _counts(answer)
    if not counts or counts[0] < 1 or len(counts) > len(spec.shape) or any(count != 1 for count in counts[1:]):
        example = [2, *[1] * len(spec.shape[1:])]
        raise ConfigError(
            f"partitioning variable {spec.name!r} of shape {list(spec.shape)}: expected the number of partitions along "
            f"each axis, all 1 but the first, such as {example}; the partitioner returned {answer!r}"
        )
    return counts[0]


def _counts(answer: object) -> list[int]:
    """Return the result of a partitioner as whole numbers; an empty list if it is not a sequence of them."""
    if not isinstance(answer, list | tuple):
        return []
    try:
        return [operator.index(count) for count in answer]
    except TypeError:
        return []


def _along_rows(shape: tuple[int, ...], num_shards: int) -> list[int]:
    _check_has_rows(shape)
    return [max(min(num_shards, shape[0]), 1), *[1] * len(shape[1:])]


def _row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    _check_has_rows(shape)
    return max(math.prod(shape[1:]) * item_bytes(dtype), 1)  # empty rows count as small ones: no division by zero


def _check_has_rows(shape: tuple[int, ...]) -> None:
    if not shape:
        raise ConfigError("a scalar has no first axis to be divided; it stays whole")


def _positive(value: int, partitioner: str, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{partitioner}: {argument}: expected a whole number above 0, got {value!r}")
    return value


def part_specs(spec: VariableSpec, ranges: Sequence[Range]) -> list[VariableSpec]:
    """Return the specs under which the ps tasks know the parts of a partitioned variable.

    >>> spec = VariableSpec("table", (5, 2), "float32")
    >>> [(part.name, part.shape) for part in part_specs(spec, [(0, 3), (3, 5)])]
    [('table/part_0', (3, 2)), ('table/part_1', (2, 2))]
    """
    rows, *rest = spec.shape
    return [
        VariableSpec(
            f"{spec.name}/part_{index}",
            (stop - start, *rest),
            spec.dtype,
            Shard(variable=spec.name, index=index, start=start, rows=rows),
        )
        for index, (start, stop) in enumerate(ranges)
    ]
