"""Variables of a worker with several replicas: what becomes of their values, and who creates the variable."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paramserver as ps
from paramserver.distribute.variables.aggregating import AggregatingVariable
from paramserver.distribute.variables.plain import PlainVariable

Mode = ps.VariableAggregation
ASSIGNMENTS = ("assign", "assign_add", "assign_sub")


def with_replicas(count: int) -> ps.ParameterServerStrategy:
    return ps.ParameterServerStrategy(compute_devices=[f"cpu:{index}" for index in range(count)])


def replica_id() -> int:
    context = ps.get_replica_context()
    assert context is not None
    assert isinstance(context.replica_id_in_sync_group, int)
    return context.replica_id_in_sync_group


@pytest.fixture
def strategy() -> ps.ParameterServerStrategy:
    return with_replicas(2)


@pytest.fixture
def create(strategy: ps.ParameterServerStrategy) -> Callable[..., Any]:
    """`ps.Variable` in the scope of a strategy of two replicas."""

    def create(*args: Any, **kwargs: Any) -> Any:
        with strategy.scope():
            return ps.Variable(*args, **kwargs)

    return create


def test_p09_several_replicas_have_a_wrapper(create: Any) -> None:
    variable = create([1.0, 2.0], name="w", trainable=False, aggregation=Mode.SUM)
    assert type(variable) is AggregatingVariable
    assert isinstance(variable, ps.Variable)
    inner = variable.get()
    assert type(inner) is PlainVariable
    for name in ("name", "shape", "dtype", "device", "trainable", "aggregation", "strategy", "distribute_strategy"):
        assert getattr(variable, name) == getattr(inner, name), name
    assert repr(variable) == "<AggregatingVariable SUM of <ps.Variable 'w' float32[2] on /device:CPU:0>>"


# --- assigned by replicas


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a01_without_an_aggregation_replicas_cannot_assign(create: Any, strategy: Any, assignment: str) -> None:
    variable = create(1, name="w")
    with pytest.raises(ValueError) as caught:
        strategy.run(lambda: getattr(variable, assignment)(1))
    for part in (assignment, "'w'", "`aggregation=`", "merge_call"):
        assert part in str(caught.value)
    assert int(variable) == 1


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(Mode.SUM, [30.0, 60.0]), (Mode.MEAN, [15.0, 30.0]), (Mode.ONLY_FIRST_REPLICA, [10.0, 20.0])],
)
@pytest.mark.parametrize(
    ("assignment", "sign", "start"), [("assign", 1, 0), ("assign_add", 1, 5), ("assign_sub", -1, 5)]
)
def test_a02_one_assignment_is_made_of_the_replicas_values(
    create: Any, strategy: Any, mode: Any, expected: list[float], assignment: str, sign: int, start: int
) -> None:
    variable = create([5.0, 5.0], aggregation=mode)
    result = strategy.run(lambda: getattr(variable, assignment)(torch.tensor([10.0, 20.0]) * (1 + replica_id())))
    assert result.tolist() == variable.value().tolist() == [start + sign * each for each in expected]


def test_a02_replicas_go_on_with_what_the_assignment_made(create: Any, strategy: Any) -> None:
    """Each of them sees it, and may assign again."""
    variable = create(0.0, aggregation=Mode.SUM)
    seen = strategy.run(lambda: [variable.assign_add(1).item(), variable.assign_add(replica_id()).item()])
    assert [each.values for each in seen] == [(2, 2), (3, 3)]


def test_a02_a_mean_of_integers_is_a_mean(create: Any, strategy: Any) -> None:
    """It is not rounded: what the dtype cannot hold is refused."""
    variable = create(0, name="n", aggregation=Mode.MEAN)
    assert strategy.run(lambda: variable.assign(2 * replica_id())).item() == 1
    with pytest.raises(ValueError, match=r"'n': expected values that int64\[\] can hold, got 0.5"):
        strategy.run(lambda: variable.assign(replica_id()))


@pytest.mark.parametrize(
    ("mode", "expected"), [(Mode.SUM, 4), (Mode.MEAN, 1), (Mode.ONLY_FIRST_REPLICA, 1)], ids=lambda each: str(each)
)
@pytest.mark.parametrize("value", [1, 1.0, torch.tensor(1.0)])
def test_a06_the_same_value_from_all_replicas_counts_for_each(mode: Any, expected: int, value: Any) -> None:
    """A Python number is a value like any other; a zero needs no special case."""
    strategy = with_replicas(4)
    with strategy.scope():
        variable = ps.Variable(0.0, aggregation=mode)
    assert strategy.run(lambda: variable.assign_add(value)).item() == expected
    assert strategy.run(lambda: variable.assign_add(0)).item() == expected


def test_a07_the_first_replicas_number_keeps_the_dtype(create: Any, strategy: Any) -> None:
    step = create(0, dtype=torch.int64, aggregation=Mode.ONLY_FIRST_REPLICA)
    assert strategy.run(lambda: step.assign_add(1.0)).dtype is torch.int64
    assert int(step) == 1


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize(("mode", "each"), [(Mode.SUM, True), (Mode.ONLY_FIRST_REPLICA, False)])
def test_w04_a_worker_counts_its_replicas_or_itself(replicas: int, mode: Any, each: bool) -> None:
    strategy = with_replicas(replicas)
    with strategy.scope():
        x = ps.Variable(0, aggregation=mode)
    strategy.run(lambda: x.assign_add(1))
    assert int(x) == (replicas if each else 1)


def test_a_value_that_does_not_fit_is_refused_by_its_replica(create: Any, strategy: Any) -> None:
    variable = create([0.0], name="w", aggregation=Mode.SUM)
    with pytest.raises(ValueError, match=r"assign to variable 'w': expected a value of float32\[1\], got float32\[2\]"):
        strategy.run(lambda: variable.assign(torch.zeros(1 + replica_id())))


def test_replicas_that_do_not_all_assign_are_told(create: Any, strategy: Any) -> None:
    """E08."""
    variable = create(0, aggregation=Mode.SUM)
    with pytest.raises(RuntimeError, match="different number of .*merge_call"):
        strategy.run(lambda: variable.assign_add(1) if replica_id() else None)


# --- assigned elsewhere


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a03_in_cross_replica_context_it_is_an_update_whatever_the_aggregation(
    create: Any, strategy: Any, mode: Any, assignment: str
) -> None:
    variable = create(5, aggregation=mode)
    expected = {"assign": 2, "assign_add": 7, "assign_sub": 3}[assignment]
    with strategy.scope():
        assert getattr(variable, assignment)(2).item() == expected
        with pytest.raises(ValueError, match="cannot update variable with a PerReplica"):
            getattr(variable, assignment)(ps.PerReplica([1, 2]))


@pytest.mark.parametrize("mode", list(Mode))
def test_a04_in_an_update_it_acts_on_what_is_wrapped(create: Any, strategy: Any, mode: Any) -> None:
    """Also where the function uses the wrapper."""
    variable = create(1, aggregation=mode)

    def change(inner: Any, by: int) -> torch.Tensor:
        assert inner is variable.get()
        inner.assign_add(by)
        return variable.assign_add(by)

    assert strategy.extended.update(variable, change, args=(3,)).item() == 7


@pytest.mark.parametrize("mode", list(Mode))
def test_a05_outside_of_all_scopes_it_enters_its_own(create: Any, mode: Any) -> None:
    variable = create(1, aggregation=mode)
    assert variable.assign_add(2).item() == 3
    assert not ps.has_strategy()


def test_a05_under_another_strategy_it_is_refused(create: Any) -> None:
    variable = create(1, name="w", aggregation=Mode.SUM)
    with with_replicas(2).scope(), pytest.raises(RuntimeError, match="Mixing different strategies.*'w'"):
        variable.assign(2)
    assert int(variable) == 1


def test_the_wrapped_one_is_assigned_as_it_stands(create: Any, strategy: Any) -> None:
    """A09: get() is the way around the aggregation."""
    inner = create(0, aggregation=Mode.SUM).get()
    strategy.run(lambda: inner.assign_add(1))
    assert int(inner) == 2


# --- in the place of a tensor


def test_a08_what_a_plain_variable_does_the_wrapper_does(create: Any) -> None:
    """A14: also what a plain one has and a tensor has not."""
    variable = create([1.0, 2.0], aggregation=Mode.SUM)
    inner = variable.get()
    same: list[Callable[[Any], Any]] = [
        lambda v: (v + 1).tolist(), lambda v: (2 * v).tolist(), lambda v: (-v).tolist(), lambda v: (v > 1).tolist(),
        lambda v: v[1].item(), lambda v: v[-1:].tolist(), lambda v: list(v), len, lambda v: v.sum().item(),
        lambda v: torch.stack([v, v]).tolist(), lambda v: v.value().tolist(), lambda v: v.read_value().tolist(),
        lambda v: v.sparse_read([1]).tolist(), lambda v: v.trainable, lambda v: v.numpy().tolist(), lambda v: v.ps,
        lambda v: v.rows(1, 2).tolist(), lambda v: f"{v}",
    ]  # fmt: skip
    for each in same:
        assert each(variable) == each(inner)
    with pytest.raises(AttributeError, match="_hidden"):
        variable._hidden  # noqa: B018


def test_a10_the_container_of_what_is_wrapped_is_the_wrapper_while_it_lives(create: Any, strategy: Any) -> None:
    container = strategy.extended.value_container
    variable = create(0, aggregation=Mode.SUM)
    inner = variable.get()
    assert container(inner) is container(variable) is variable
    del variable
    gc.collect()
    assert container(inner) is inner
    assert container(3) == 3


def test_a12_a_checkpoint_does_not_tell_one_replica_from_several(tmp_path: Path) -> None:
    """Its name and its content are the same."""
    saved = []
    for replicas in (1, 2):
        strategy = with_replicas(replicas)
        with strategy.scope():
            variable = ps.Variable([1.0, 2.0], name="w", aggregation=Mode.SUM)
        variable.assign_add(replicas)
        folder = tmp_path / str(replicas)
        folder.mkdir()
        (shard,) = strategy.connect().save(str(folder))
        saved.append({name: value.tolist() for name, value in load_file(folder / shard.weight_map["w"]).items()})
    assert saved == [{"w": [2.0, 3.0]}, {"w": [3.0, 4.0]}]


def test_a13_a_deep_copy_is_wrapped_too(create: Any, strategy: Any) -> None:
    variable = create([1.0], name="w", aggregation=Mode.SUM)
    duplicate = copy.deepcopy(variable)
    assert type(duplicate) is AggregatingVariable
    assert (duplicate.strategy, duplicate.device, duplicate.aggregation) == (strategy, variable.device, Mode.SUM)
    strategy.run(lambda: duplicate.assign_add(1))
    assert (float(variable), float(duplicate)) == (1, 3)
    with with_replicas(2).scope(), pytest.raises(RuntimeError, match="Mixing different strategies: deepcopy"):
        copy.deepcopy(variable)


# --- created by replicas


def test_p14_replicas_share_what_replica_0_creates(strategy: Any) -> None:
    """By the name that they ask for, in the order of creation; replica 0's initial value is everyone's."""
    calls = []

    def initial() -> float:
        calls.append(1)
        return 1.0

    def fn() -> Any:
        return [ps.Variable(initial, name="w", aggregation=Mode.SUM), ps.Variable(float(replica_id()), name="w")]

    first, second = strategy.run(fn)
    assert isinstance(first, AggregatingVariable)
    assert [first.name, second.name] == ["w", "w_1"]
    assert [float(first), float(second)] == [1, 0]
    assert len(calls) == 1
    again, _ = strategy.run(fn)
    assert again.name == "w_2"


def test_p14_replicas_assign_to_what_they_have_created(strategy: Any) -> None:
    def fn() -> torch.Tensor:
        return ps.Variable(0, aggregation=Mode.SUM).assign_add(1 + replica_id())

    assert strategy.run(fn).item() == 3


def test_p14_one_replica_creates_as_well() -> None:
    variable = with_replicas(1).run(lambda: ps.Variable(3, name="w"))
    assert type(variable) is PlainVariable
    assert int(variable) == 3


def test_p15_replicas_that_create_by_different_names_are_refused(strategy: Any) -> None:
    with pytest.raises(RuntimeError, match=r"replica 1 Tried to create variable 'w1' with mismatching name: .*'w0'"):
        strategy.run(lambda: ps.Variable(0, name=f"w{replica_id()}"))
    assert strategy.run(lambda: ps.Variable(0, name="w0")).name == "w0", "nothing was made"


def test_p15_a_replica_that_creates_more_than_the_others_is_refused(strategy: Any) -> None:
    with pytest.raises(RuntimeError, match="different number of .*merge_call"):
        strategy.run(lambda: ps.Variable(0) if replica_id() else None)


def test_p10_replicas_are_told_of_a_bad_aggregation(strategy: Any) -> None:
    with pytest.raises(ValueError, match="'w': invalid aggregation 7"):
        strategy.run(lambda: ps.Variable(0, name="w", aggregation=7))  # type: ignore[arg-type]
