"""Any layout: variables aligned, apart and inside; pieces cover exactly; merging swallows nobody."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from paramserver.layout.arena import ALIGNMENT, ArenaLayout
from paramserver.layout.blocks import BLOCK, Range, join_ranges, pieces
from paramserver.layout.variables import DTYPES, VariableSpec

shapes = st.lists(st.lists(st.integers(0, 70), max_size=2).map(tuple), max_size=8)


@st.composite
def layouts(draw: st.DrawFn) -> ArenaLayout:
    dtype = draw(st.sampled_from(list(DTYPES)))
    variables = tuple(VariableSpec(f"v{index}", shape, dtype) for index, shape in enumerate(draw(shapes)))
    return ArenaLayout(dtype, None, variables)


@st.composite
def sorted_ranges(draw: st.DrawFn) -> list[Range]:
    """Ranges of any length around the ends of blocks, in order, not overlapping."""
    near = st.integers(-3, 3)
    cuts = st.builds(lambda block, offset: max(block * BLOCK + offset, 0), st.integers(0, 3), near)
    edges = sorted(draw(st.lists(cuts, max_size=12)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@given(layouts())
def test_variables_are_aligned_apart_and_inside(layout: ArenaLayout) -> None:
    assert all(offset * layout.itemsize % ALIGNMENT == 0 for offset in layout.offsets)
    assert [stop - start for start, stop in layout.ranges] == [variable.size for variable in layout.variables]
    edges = [0, *itertools.chain(*layout.ranges), layout.size]
    assert edges == sorted(edges)
    assert layout.nbytes == layout.size * layout.itemsize


@given(layouts())
def test_views_alias_the_arena_each_its_own_part(layout: ArenaLayout) -> None:
    flat = torch.zeros(layout.size, dtype=torch.uint8)
    for number, view in enumerate(layout.views(flat), start=1):
        view.fill_(number)
    for number, (start, stop) in enumerate(layout.ranges, start=1):
        assert flat[start:stop].eq(number).all()
    assert flat.count_nonzero() == sum(variable.size for variable in layout.variables)


@given(sorted_ranges())
def test_pieces_cover_exactly_and_never_cross_a_block(ranges: list[Range]) -> None:
    cut = list(pieces(ranges))
    assert all(start < stop and start // BLOCK == (stop - 1) // BLOCK for start, stop in cut)
    joined = join_ranges(cut, gap=0)
    assert joined == join_ranges([span for span in ranges if span[0] < span[1]], gap=0)
    assert sum(stop - start for start, stop in cut) == sum(stop - start for start, stop in ranges)


@given(layouts(), st.data())
def test_merging_what_is_present_swallows_nothing_that_is_absent(layout: ArenaLayout, data: st.DataObject) -> None:
    """With the gap that a step uses: a variable without a gradient keeps its value and its slots."""
    here = data.draw(st.lists(st.booleans(), min_size=len(layout.ranges), max_size=len(layout.ranges)))
    merged = join_ranges(
        [span for span, present in zip(layout.ranges, here, strict=True) if present],
        gap=ALIGNMENT // layout.itemsize - 1,
    )
    assert all(first[1] < second[0] for first, second in itertools.pairwise(merged))
    for (start, stop), present in zip(layout.ranges, here, strict=True):
        inside = [first <= start and stop <= last for first, last in merged]
        outside = [stop <= first or last <= start for first, last in merged]
        assert any(inside) if present else all(outside) or start == stop


@given(layouts())
def test_a_whole_model_is_one_range(layout: ArenaLayout) -> None:
    assert len(join_ranges(layout.ranges, gap=ALIGNMENT // layout.itemsize - 1)) == min(len(layout.variables), 1)
