"""Loops over the rows of tables, compiled by numba; only `paramserver.memory.rows.loops_for` imports this module.

The rows of a large table are not in the cache. A loop prefetches the next rows while it works on one, which NumPy and
torch cannot do, and does in one pass what they do in several. A row that starts in the middle of a cache line may end
in one line more than its length suggests, so its last element is prefetched, too.

All arrays are flat. Ids, places and row numbers are uint64, because numba would check each signed index for counting
from the end. Nothing is checked, except for the ids in `gather`: a program could change the ids of a batch meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj

Function = TypeVar("Function", bound=Callable[..., Any])
Array = npt.NDArray[Any]
Numbers = npt.NDArray[np.uint64]

AHEAD = 64
"""Number of cache lines of a table to prefetch. A loop that runs alone needs only 16; others keep the memory busy."""
LINE = 64
"""Size of a cache line in bytes."""
DIGIT = 11
"""Number of bits by which ids are sorted at once: their values can be counted in the fastest cache."""

_1 = np.uint64(1)
_make_array: Any = arrayobj.make_array


def _compiled(function: Function) -> Function:
    """Compile a function for its argument types on the first call with them; the function releases the GIL."""
    return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))


def _intrinsic(function: Callable[..., Any]) -> Any:
    """Make an intrinsic of a function; calls omit its first argument."""
    return intrinsic(function)


def _asking(*, to_write: bool) -> Any:
    """Return a function of an array and an index that prefetches the cache line of this element without waiting."""

    @_intrinsic
    def ask(typing: Any, array: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = builder.gep(_make_array(array)(context, builder, arguments[0]).data, [arguments[1]])
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
            stay, is_data = number(3), number(1)
            builder.call(prefetch, [builder.bitcast(address, byte), number(int(to_write)), stay, is_data])
            return context.get_dummy_value()

        return types.void(array, index), code

    return ask


_ask_for = _asking(to_write=False)
_ask_to_write = _asking(to_write=True)  # takes the line away from other cores


@_intrinsic
def _fused(typing: Any, one: Any, other: Any, addend: Any) -> Any:
    """Return ``one * other + addend``, rounded once."""
    return one(one, one, one), lambda context, builder, signature, arguments: builder.fma(*arguments)


@_compiled
def _rows_ahead(width: np.uint64, line: np.uint64) -> np.uint64:
    """Return the number of rows that `AHEAD` lines hold, given the elements in a row and in a line."""
    return np.uint64(AHEAD) // ((width + line - _1) // line) + _1


@_compiled
def _fetch(array: Array, start: np.uint64, width: np.uint64, line: np.uint64) -> None:
    """Prefetch ``width`` elements to read."""
    for j in range(start, start + width, line):
        _ask_for(array, j)
    _ask_for(array, start + width - _1)


@_compiled
def _fetch_to_write(array: Array, start: np.uint64, width: np.uint64, line: np.uint64) -> None:
    """Prefetch ``width`` elements to write."""
    for j in range(start, start + width, line):
        _ask_to_write(array, j)
    _ask_to_write(array, start + width - _1)


@_compiled
def gather(values: Array, ids: Numbers, width: np.uint64, out: Array) -> None:
    """Copy the rows ``ids`` of ``values`` to ``out``; an id that is too large gives the last row."""
    count, line = np.uint64(len(ids)), np.uint64(LINE // values.itemsize)
    ahead, last = _rows_ahead(width, line), np.uint64(len(values)) // width - _1
    for i in range(count):
        if i + ahead < count:
            _fetch(values, ids[i + ahead] * width, width, line)
        row, its_copy = min(ids[i], last) * width, i * width
        for j in range(width):
            out[its_copy + j] = values[row + j]


@_compiled
def sgd(values: Array, ids: Numbers, gradient: Array, width: np.uint64, lr: np.floating) -> None:
    """Make a step of torch.optim.SGD on the rows ``ids`` of ``values``, equal bit for bit."""
    count, line = np.uint64(len(ids)), np.uint64(LINE // values.itemsize)
    ahead = _rows_ahead(width, line)
    for i in range(count):
        if i + ahead < count:
            _fetch_to_write(values, ids[i + ahead] * width, width, line)
        row, its_gradient = ids[i] * width, i * width
        for j in range(width):
            values[row + j] = _fused(-lr, gradient[its_gradient + j], values[row + j])


@_compiled
def adagrad(
    values: Array, sums: Array, ids: Numbers, gradient: Array, width: np.uint64, lr: np.floating, eps: np.floating
) -> None:
    """Make a step of torch.optim.Adagrad on the rows ``ids`` of ``values``, equal bit for bit.

    ``lr`` is the decayed learning rate of this step.
    """
    count, line = np.uint64(len(ids)), np.uint64(LINE // values.itemsize)
    ahead = _rows_ahead(width, line)
    for i in range(count):
        if i + ahead < count:
            _fetch_to_write(values, ids[i + ahead] * width, width, line)
            _fetch_to_write(sums, ids[i + ahead] * width, width, line)
        row, its_gradient = ids[i] * width, i * width
        for j in range(width):
            each = gradient[its_gradient + j]
            total = _fused(each, each, sums[row + j])
            sums[row + j] = total
            values[row + j] -= lr * each / (np.sqrt(total) + eps)


@_compiled
def add_up(
    rows: Array, group: np.uint64, gap: np.uint64, places: Numbers, numbers: Numbers, width: np.uint64, sums: Array
) -> None:
    """Compute `rows.add_up` into ``sums``; a gap of ``gap`` elements follows each ``group`` of rows."""
    count, line = np.uint64(len(places)), np.uint64(LINE // rows.itemsize)
    ahead = _rows_ahead(width, line)
    for i in range(count):
        if i + ahead < count:
            next_place = places[i + ahead]
            _fetch(rows, next_place * width + next_place // group * gap, width, line)
        row, its_sum = places[i] * width + places[i] // group * gap, numbers[i] * width
        if i > 0 and numbers[i] == numbers[i - _1]:
            for j in range(width):
                sums[its_sum + j] += rows[row + j]
        else:
            for j in range(width):
                sums[its_sum + j] = rows[row + j]


@_compiled
def arrange(ids: Numbers, bits: int) -> tuple[Numbers, Numbers, Numbers]:
    """Return the rows, order and numbers of a `Lookup` for ids of at most ``bits`` bits, by a radix sort."""
    count, mask = np.uint64(len(ids)), np.uint64((1 << DIGIT) - 1)
    behind = np.uint64(0)
    while count >> behind:
        behind += _1
    keys, sorted_keys = np.empty_like(ids), np.empty_like(ids)
    for i in range(count):
        keys[i] = ids[i] << behind | i  # the id, and its position in the low bits
    ends = np.empty(1 << DIGIT, dtype=np.uint64)
    for shift in range(behind, behind + np.uint64(bits), np.uint64(DIGIT)):
        ends[:] = 0
        for i in range(count):
            ends[keys[i] >> shift & mask] += _1
        end = np.uint64(0)
        for digit in range(len(ends)):
            end, ends[digit] = end + ends[digit], end
        for i in range(count):
            digit = keys[i] >> shift & mask
            sorted_keys[ends[digit]] = keys[i]
            ends[digit] += _1
        keys, sorted_keys = sorted_keys, keys
    rows, order, numbers = sorted_keys, np.empty_like(ids), np.empty_like(ids)
    found = np.uint64(0)
    for i in range(count):
        row = keys[i] >> behind
        if found == 0 or row != rows[found - _1]:
            rows[found] = row
            found += _1
        order[i], numbers[i] = keys[i] & ((_1 << behind) - _1), found - _1
    return rows[:found], order, numbers
