"""Any variables have a place, the same in every process, and no ps is left out."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from paramserver.arena import VariableSpec
from paramserver.placement import RoundRobin

shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=40)


@given(shapes, st.integers(1, 12))
def test_round_robin_is_deterministic_and_balanced(shapes: list[tuple[int, ...]], num_ps: int) -> None:
    variables = [VariableSpec(f"v{index}", shape, "float32") for index, shape in enumerate(shapes)]
    places = RoundRobin().place(variables, num_ps)
    assert places == RoundRobin().place(variables, num_ps)
    held = Counter(places)
    assert len(places) == len(variables)
    assert set(held) <= set(range(num_ps))
    assert max(held.values(), default=0) - min((held[ps] for ps in range(num_ps)), default=0) <= 1


@given(shapes, st.integers(1, 12))
def test_round_robin_keeps_its_places_when_a_variable_is_added(shapes: list[tuple[int, ...]], num_ps: int) -> None:
    variables = [VariableSpec(f"v{index}", shape, "float32") for index, shape in enumerate(shapes)]
    assert RoundRobin().place(variables, num_ps)[:-1] == RoundRobin().place(variables[:-1], num_ps)
