"""Any variables have a place, the same in every process, and no ps is left out; any rows lie in one part."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.layout.variables import VariableSpec
from paramserver.placement import (
    FixedShards,
    Greedy,
    MaxSize,
    MinSize,
    Partitioner,
    Placement,
    Random,
    RoundRobin,
    byte_size,
    row_ranges,
)

shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=40)
counts = st.integers(1, 12)
partitioners: st.SearchStrategy[Partitioner] = st.one_of(
    st.builds(FixedShards, st.integers(1, 40)),
    st.builds(MinSize, st.integers(1, 400), st.integers(1, 40)),
    st.builds(MaxSize, st.integers(1, 400), st.none() | st.integers(1, 40)),
)


def specs(shapes: list[tuple[int, ...]]) -> list[VariableSpec]:
    return [VariableSpec(f"v{index}", shape, "float32") for index, shape in enumerate(shapes)]


def places(placement: Placement, variables: list[VariableSpec], num_ps: int) -> list[int]:
    place = placement.start(num_ps)
    return [place(variable) for variable in variables]


@given(shapes, counts)
def test_p01_round_robin_is_balanced(shapes: list[tuple[int, ...]], num_ps: int) -> None:
    held = Counter(places(RoundRobin(), specs(shapes), num_ps))
    assert max(held.values(), default=0) - min((held[ps] for ps in range(num_ps)), default=0) <= 1


@pytest.mark.parametrize("placement", [RoundRobin(), Greedy(), Random(3)], ids=lambda each: type(each).__name__)
@given(shapes, counts)
def test_places_are_deterministic_and_stay_when_a_variable_is_added(
    placement: Placement, shapes: list[tuple[int, ...]], num_ps: int
) -> None:
    found = places(placement, specs(shapes), num_ps)
    assert set(found) <= set(range(num_ps))
    assert found == places(placement, specs(shapes), num_ps)
    assert found[:-1] == places(placement, specs(shapes[:-1]), num_ps)


@given(shapes, counts)
def test_p31_greedy_of_a_constant_load_is_round_robin(shapes: list[tuple[int, ...]], num_ps: int) -> None:
    variables = specs(shapes)
    assert places(Greedy(lambda _: 1), variables, num_ps) == places(RoundRobin(), variables, num_ps)


@given(shapes, counts)
def test_p30_greedy_loads_differ_by_the_largest_variable_at_most(shapes: list[tuple[int, ...]], num_ps: int) -> None:
    variables = specs(shapes)
    loads = Counter(dict.fromkeys(range(num_ps), 0))
    for variable, ps in zip(variables, places(Greedy(), variables, num_ps), strict=True):
        loads[ps] += byte_size(variable)
    assert max(loads.values()) - min(loads.values()) <= max(map(byte_size, variables), default=0)


@given(st.text(), st.integers(), counts)
def test_p34_random_takes_any_name_and_seed(name: str, seed: int, num_ps: int) -> None:
    variable = VariableSpec(name, (), "float32")
    assert places(Random(seed), [variable, variable], num_ps) == [Random(seed).start(num_ps)(variable)] * 2


@given(partitioners, st.tuples(st.integers(0, 60), st.integers(0, 9)))
def test_v2_03_every_row_lies_in_one_part_and_parts_are_alike(partitioner: Partitioner, shape: tuple[int, int]) -> None:
    ranges = row_ranges(partitioner, VariableSpec("v", shape, "float32"))
    if not ranges:
        return
    assert len(ranges) > 1
    assert list(itertools.chain(*(range(*each) for each in ranges))) == list(range(shape[0]))
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < sizes[0] <= sizes[-1] + 1


@given(st.integers(1, 400), st.tuples(st.integers(1, 60), st.integers(1, 9)))
def test_v2_04_sizes_are_kept(size: int, shape: tuple[int, int]) -> None:
    spec = VariableSpec("v", shape, "float32")
    row_bytes = 4 * shape[1]
    for start, stop in row_ranges(MinSize(size, max_shards=100), spec):
        assert (stop - start) * row_bytes >= size
    for start, stop in row_ranges(MaxSize(size), spec) or [(0, shape[0])]:
        assert (stop - start) * row_bytes <= max(size, row_bytes)
