"""Where each variable lies."""

import pytest
import torch

from paramserver.errors import ConfigError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK, join_ranges, num_blocks, pieces
from paramserver.layout.variables import DTYPES, VariableSpec, dtype_name
from paramserver.memory.arena_memory import tensor_bytes


def layout(dtype, *shapes):
    return ArenaLayout(dtype, None, tuple(VariableSpec(f"v{i}", shape, dtype) for i, shape in enumerate(shapes)))


def test_an_arena_may_be_empty():
    empty = layout("float32")
    assert (empty.offsets, empty.size, empty.nbytes, empty.ranges, empty.pieces) == ((), 0, 0, (), ())
    assert empty.views(torch.empty(0)) == []


@pytest.mark.parametrize(
    ("dtype", "offsets"),
    [("float64", (0, 8, 8)), ("float32", (0, 16, 16)), ("bfloat16", (0, 32, 32)), ("bool", (0, 64, 64))],
)
def test_variables_start_at_multiples_of_64_bytes(dtype, offsets):
    arena = layout(dtype, (), (0, 3), (2, 2))
    assert arena.offsets == offsets
    assert arena.ranges == ((0, 1), (offsets[1], offsets[1]), (offsets[1], offsets[1] + 4))
    assert arena.size == offsets[1] + 4


def test_views_have_the_shapes_and_share_the_memory():
    arena = layout("float32", (), (0, 3), (2, 3))
    flat = torch.arange(arena.size, dtype=torch.float32)
    scalar, nothing, matrix = arena.views(flat)
    assert (scalar.shape, nothing.shape, matrix.shape) == ((), (0, 3), (2, 3))
    matrix.zero_()
    assert flat[16:].eq(0).all()


def test_pieces_are_cut_at_blocks():
    assert list(pieces([(5, 10), (BLOCK - 1, 2 * BLOCK + 1)])) == [
        (5, 10),
        (BLOCK - 1, BLOCK),
        (BLOCK, 2 * BLOCK),
        (2 * BLOCK, 2 * BLOCK + 1),
    ]
    assert list(pieces([(7, 7)])) == []


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (BLOCK, 1), (BLOCK + 1, 2)])
def test_the_last_block_may_be_partial(size, blocks):
    assert num_blocks(size) == blocks == len(layout("float32", (size,)).pieces)


def test_ranges_are_merged_over_a_gap_and_not_over_more():
    assert join_ranges([(0, 6), (16, 18)], gap=10) == ((0, 18),)
    assert join_ranges([(0, 6), (16, 18)], gap=9) == ((0, 6), (16, 18))
    assert join_ranges([], gap=9) == ()


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_has_a_name_and_bytes(dtype):
    assert DTYPES[dtype_name(dtype, "w")] is dtype
    tensor = torch.zeros(3, dtype=dtype)
    tensor_bytes(tensor)[:] = b"\1" * 3 * dtype.itemsize
    assert tensor.view(torch.uint8).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.quint8])
def test_a_dtype_that_no_ps_holds_is_refused_with_the_variable(dtype):
    with pytest.raises(ConfigError, match=r"'emb/table' has dtype .*; expected one of float32"):
        dtype_name(dtype, "emb/table")
