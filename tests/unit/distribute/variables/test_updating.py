"""Updates from the cross-replica context, and what a strategy's `extended` says of variables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paramserver as ps
from paramserver.client.client import ParameterClient
from paramserver.distribute.core.context import get_update_replica_id
from paramserver.server.server import play_in_process

CLUSTER = ps.ClusterSpec({"chief": ["a:1"], "ps": ["b:1", "c:1", "d:1"]})


def on_three_ps(replicas: int = 1) -> ps.ParameterServerStrategy:
    """A chief of a cluster whose three ps tasks are played in this process."""
    resolver = ps.SimpleClusterResolver(CLUSTER, task_type="chief", task_id=0)
    strategy = ps.ParameterServerStrategy(resolver, compute_devices=[f"cpu:{index}" for index in range(replicas)])
    strategy.client = ParameterClient([play_in_process(index=index)() for index in range(3)])
    return strategy


@pytest.fixture(params=[1, 2])
def strategy(request: pytest.FixtureRequest) -> ps.ParameterServerStrategy:
    return on_three_ps(request.param)


@pytest.fixture
def variable(strategy: ps.ParameterServerStrategy) -> ps.Variable:
    """On ps:1."""
    with strategy.scope():
        ps.Variable(0)
        return ps.Variable([1.0, 2.0], name="w")


def add(variable: ps.Variable, value: Any) -> torch.Tensor:
    return variable.assign_add(value)


# --- update


def test_u01_the_function_gets_what_lies_on_the_ps(strategy: Any, variable: ps.Variable) -> None:
    """Unwrapped, with its arguments, in the context of an update on its device."""

    def change(inner: ps.Variable, by: float, *, times: float) -> list[float]:
        assert inner is variable.get()
        assert ps.in_cross_replica_context()
        assert get_update_replica_id() == variable.device == "/job:ps/task:1/device:CPU:0"
        return [float(each) for each in inner.assign_add(by * times)]

    assert strategy.extended.update(variable, change, args=(2.0,), kwargs={"times": 3.0}) == [7.0, 8.0]
    with strategy.scope():
        assert strategy.extended.update(variable, change, (1.0,), {"times": 1.0}) == [8.0, 9.0]


@pytest.mark.parametrize("thing", [torch.zeros(1), 3, None, "w"])
def test_u02_what_is_no_variable_is_refused(strategy: Any, thing: Any) -> None:
    with pytest.raises(ValueError, match=f"It must be a Variable, got {type(thing).__name__}"):
        strategy.extended.update(thing, add, (1,))


def test_a_variable_of_another_strategy_is_refused(strategy: Any, variable: ps.Variable) -> None:
    with pytest.raises(ValueError, match="'w'.* belongs to"):
        on_three_ps().extended.update(variable, add, (1,))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((ps.PerReplica([1.0, 2.0]),), {}),
        ((ps.PerReplica([1.0]),), {}),
        ((), {"value": ps.Mirrored([1.0, 1.0])}),
        (([{"deep": (ps.PerReplica([1.0, 2.0]),)}],), {}),
    ],
)
def test_u03_a_value_for_each_replica_is_refused(strategy: Any, variable: ps.Variable, args: Any, kwargs: Any) -> None:
    with pytest.raises(ValueError, match="'w': cannot update variable with a (PerReplica|Mirrored)"):
        strategy.extended.update(variable, add, args, kwargs)


def test_u03_a_value_on_one_device_is_unwrapped(strategy: Any, variable: ps.Variable) -> None:
    seen = []
    strategy.extended.update(variable, lambda _, *args: seen.append(args), ([ps.Mirrored([1.0])], ps.Mirrored([2.0])))
    assert seen == [([1.0], 2.0)]


def test_u04_group_returns_the_result_and_without_it_tuples(strategy: Any, variable: ps.Variable) -> None:
    def fn(_: ps.Variable) -> dict[str, Any]:
        return {"one": 1, "more": [2, 3]}

    assert strategy.extended.update(variable, fn) == {"one": 1, "more": [2, 3]}
    assert strategy.extended.update(variable, fn, group=False) == {"one": (1,), "more": [(2,), (3,)]}


def test_u05_inside_replicas_it_is_one_merge(strategy: Any, variable: ps.Variable) -> None:
    """Once for all of them; what differs between them is refused as in cross-replica context."""
    value = torch.tensor([1.0, 1.0])
    result = strategy.run(lambda: strategy.extended.update(variable, add, (value,)))
    assert result.tolist() == variable.value().tolist() == [2, 3]
    if strategy.num_replicas_in_sync > 1:
        with pytest.raises(ValueError, match="cannot update variable with a PerReplica"):
            strategy.run(lambda: strategy.extended.update(variable, add, (torch.ones(2),)))


def test_u08_the_device_of_an_update_is_forgotten_afterwards(strategy: Any, variable: ps.Variable) -> None:
    def fail(_: ps.Variable) -> None:
        assert get_update_replica_id() == variable.device
        raise KeyError("on purpose")

    for scope in (strategy.scope(), None):
        with pytest.raises(KeyError, match="on purpose"):
            strategy.extended.update(variable, fail)
        assert get_update_replica_id() is None
        if scope:
            scope.__enter__()
            scope.__exit__(None, None, None)


def test_x08_an_update_under_another_strategy_is_refused(strategy: Any, variable: ps.Variable) -> None:
    with on_three_ps().scope(), pytest.raises(RuntimeError, match="Mixing different strategies"):
        strategy.extended.update(variable, add, (1,))


# --- update_non_slot


def test_u06_it_runs_once_on_the_device_of_what_it_is_beside(strategy: Any, variable: ps.Variable) -> None:
    """Its arguments are passed as they are, wrapped or not."""
    argument = ps.PerReplica([1, 2])

    def fn(*args: Any) -> tuple[Any, ...]:
        return (*args, get_update_replica_id())

    for beside in (variable, variable.device, "/job:ps/task:1"):
        result = strategy.extended.update_non_slot(beside, fn, (argument, variable))
        assert result == (argument, variable, "/job:ps/task:1/device:CPU:0")
    assert strategy.extended.update_non_slot("cpu:0", lambda: [1], group=False) == [(1,)]
    assert strategy.extended.update_non_slot(torch.zeros(1), get_update_replica_id) == "/device:CPU:0"


def test_u06_what_names_no_device_is_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match="'nowhere' names no device"):
        strategy.extended.update_non_slot("nowhere", lambda: None)


def test_x06_inside_a_replica_it_is_refused(strategy: Any, variable: ps.Variable) -> None:
    with pytest.raises(RuntimeError, match=r"update_non_slot .*merge_call"):
        strategy.run(lambda: strategy.extended.update_non_slot(variable, lambda: None))


def test_u07_state_of_no_variable_lives_beside_the_one_of_the_smallest_name(strategy: Any) -> None:
    with strategy.scope():
        variables = [ps.Variable(0, name=name) for name in ("m", "c", "x")]
    for order in (variables, variables[::-1]):
        assert strategy.extended.non_slot_devices(order) is variables[1]


# --- colocation


def test_p04_colocated_variables_go_beside_it_and_take_no_turn(strategy: Any, variable: ps.Variable) -> None:
    with strategy.scope():
        with strategy.extended.colocate_vars_with(variable):
            beside = [ps.Variable(0) for _ in range(2)]
            with strategy.extended.colocate_vars_with(beside[0]):
                beside.append(ps.Variable(0))
        following = ps.Variable(0)
    assert [each.device for each in beside] == [variable.device] * 3
    assert following.device == "/job:ps/task:2/device:CPU:0"


def test_p04_replicas_colocate_too(strategy: Any, variable: ps.Variable) -> None:
    def fn() -> ps.Variable:
        with strategy.extended.colocate_vars_with(variable):
            return ps.Variable(0)

    assert strategy.run(fn).device == variable.device
    with strategy.scope(), strategy.extended.colocate_vars_with(variable):
        assert strategy.run(lambda: ps.Variable(0)).device == variable.device


def test_p04_colocation_ends_with_its_block_also_by_an_exception(strategy: Any, variable: ps.Variable) -> None:
    with strategy.scope():
        with pytest.raises(KeyError), strategy.extended.colocate_vars_with(variable):
            raise KeyError
        assert ps.Variable(0).device == "/job:ps/task:2/device:CPU:0"


def test_p04_colocation_is_the_strategys_own(strategy: Any, variable: ps.Variable) -> None:
    with strategy.scope():
        beside = strategy.extended.colocate_vars_with(variable)
    other = on_three_ps()
    with beside, other.scope():
        assert [ps.Variable(0).ps for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("thing", [torch.zeros(1), None, "/job:ps/task:0"])
def test_p05_only_variables_of_the_strategy_are_colocated_with(strategy: Any, thing: Any) -> None:
    message = r"must only be passed a variable created in this .*scope\(\)"
    with strategy.scope(), pytest.raises(ValueError, match=message):
        strategy.extended.colocate_vars_with(thing)


def test_p05_a_variable_of_another_strategy_is_refused(strategy: Any) -> None:
    other = on_three_ps()
    with other.scope():
        theirs = ps.Variable(0, name="theirs")
    with strategy.scope(), pytest.raises(ValueError, match="created in this .*'theirs'.* belongs to"):
        strategy.extended.colocate_vars_with(theirs)


def test_p05_outside_of_the_scope_nothing_is_colocated(strategy: Any, variable: ps.Variable) -> None:
    with pytest.raises(RuntimeError, match="Need to be inside"):
        strategy.extended.colocate_vars_with(variable)


# --- reading


def test_a11_read_var_gives_a_copy_and_reduces_nothing(strategy: Any, variable: ps.Variable) -> None:
    read = strategy.extended.read_var(variable)
    assert read.tolist() == [1, 2]
    read.zero_()
    assert variable.value().tolist() == [1, 2]


def test_a10_a_container_of_anything_else_is_the_thing_itself(strategy: Any, variable: ps.Variable) -> None:
    container = strategy.extended.value_container
    thing = object()
    assert container(thing) is thing
    assert container(variable) is container(variable.get()) is variable
