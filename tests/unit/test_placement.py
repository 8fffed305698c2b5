"""Which ps holds a variable."""

import pytest

from paramserver.arena import VariableSpec
from paramserver.errors import ConfigError
from paramserver.placement import Placement, RoundRobin

VARIABLES = [VariableSpec(name, (size,), "float32") for name, size in zip("abcde", (1, 1000, 0, 7, 7), strict=True)]


def test_round_robin_takes_turns_in_the_order_of_creation():
    assert RoundRobin().place(VARIABLES, num_ps=2) == [0, 1, 0, 1, 0]


def test_one_ps_holds_everything():
    assert RoundRobin().place(VARIABLES, num_ps=1) == [0] * 5


def test_there_may_be_more_ps_than_variables():
    assert RoundRobin().place(VARIABLES, num_ps=9) == [0, 1, 2, 3, 4]


def test_no_variables_need_no_place():
    assert RoundRobin().place([], num_ps=3) == []


@pytest.mark.parametrize("num_ps", [0, -1])
def test_without_a_ps_there_is_no_place(num_ps):
    with pytest.raises(ConfigError, match=f"5 variables.*at least one ps, got {num_ps}"):
        RoundRobin().place(VARIABLES, num_ps)


def test_a_placement_must_say_where():
    with pytest.raises(TypeError, match="place"):
        Placement()
