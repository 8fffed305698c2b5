"""Which strategy and which replica a thread is in: scopes, the default strategy, and what may be called where."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import paramserver as ps
from paramserver.distribute.core import context

VALUE = torch.ones(2)


def strategy(replicas: int = 1) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])


def where() -> tuple[bool, bool, bool]:
    """Whether this thread has a strategy, is in a cross-replica context, has a replica."""
    assert ps.in_replica_context() is not ps.in_cross_replica_context()
    return ps.has_strategy(), ps.in_cross_replica_context(), ps.get_replica_context() is not None


def on_a_thread(fn: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(fn()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def _no_context_is_left() -> Iterator[None]:
    yield
    assert context.current() is None


# --- where a thread is


def test_outside_of_any_scope_a_default_strategy_of_one_replica_is_in_effect() -> None:
    """X01."""
    assert where() == (False, False, True)
    default = ps.get_strategy()
    assert default is ps.get_strategy()
    assert (default.num_replicas_in_sync, default.is_chief, default.cluster_resolver) == (1, True, None)
    assert default.extended.worker_devices == default.extended.parameter_devices == ("/device:CPU:0",)
    assert default.input_context.num_input_pipelines == 1
    replica = ps.get_replica_context()
    assert replica is not None
    assert (replica.strategy, replica.replica_id_in_sync_group, replica.num_replicas_in_sync) == (default, 0, 1)


def test_the_default_strategy_runs_and_reduces_and_has_no_variables() -> None:
    """X01, X07."""
    default = ps.get_strategy()
    assert default.run(lambda a: (a, where()), (3,)) == (3, (False, False, True))
    assert default.reduce("sum", VALUE) is VALUE
    model = torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="Need to be inside `with strategy.scope\\(\\):`"):
        default.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="Need to be inside `with strategy.scope\\(\\):`"):
        default.connect()


def test_inside_a_scope() -> None:
    """X02."""
    runner = strategy()
    with runner.scope() as entered:
        assert entered is runner is ps.get_strategy()
        assert where() == (True, True, False)
    assert where() == (False, False, True)


@pytest.mark.parametrize("replicas", [1, 2])
def test_inside_replicas_and_in_a_merge(replicas: int) -> None:
    """X02: exactly one of a replica and the cross-replica context."""
    runner, places = strategy(replicas), []

    def step() -> None:
        places.append((ps.get_strategy() is runner, where()))
        ps.get_replica_context().merge_call(lambda _: places.append((ps.get_strategy() is runner, where())))  # type: ignore[union-attr]
        places.append((ps.get_strategy() is runner, where()))

    runner.run(step)
    inside, merging = (True, (True, False, True)), (True, (True, True, False))
    assert places == [inside] * replicas + [merging] + [inside] * replicas


def test_a_scope_may_be_entered_again_inside_itself() -> None:
    """X03."""
    runner = strategy()
    with runner.scope():
        with runner.scope():
            assert ps.get_strategy() is runner
        assert ps.get_strategy() is runner
    assert not ps.has_strategy()


def test_a_scope_of_another_strategy_is_refused() -> None:
    """X04."""
    one, other = strategy(), strategy()
    with one.scope():
        with pytest.raises(RuntimeError, match="Mixing different strategies"), other.scope():
            pytest.fail("a second strategy was entered")
        assert ps.get_strategy() is one


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_scope_is_not_entered_inside_a_replica(replicas: int) -> None:
    """X05."""
    runner = strategy(replicas)

    def step() -> None:
        with runner.scope():
            pytest.fail("a scope was entered inside a replica")

    with pytest.raises(RuntimeError, match=r"requires being in cross-replica context.*get_replica_context\(\).merge_"):
        runner.run(step)


def test_a_scope_may_be_entered_in_a_merge() -> None:
    """X05."""
    runner = strategy(2)

    def merged(same: ps.CentralStorageStrategy) -> str:
        with same.scope():
            return "merged"

    assert runner.run(lambda: ps.get_replica_context().merge_call(merged)) == "merged"  # type: ignore[union-attr]


# --- what may be called where

CROSS_REPLICA: dict[str, Callable[[Any], Any]] = {
    "reduce": lambda runner: runner.reduce("mean", VALUE),
    "reduce_to": lambda runner: runner.extended.reduce_to("mean", VALUE, "cpu"),
    "batch_reduce_to": lambda runner: runner.extended.batch_reduce_to("mean", [(VALUE, "cpu")])[0],
    "broadcast_to": lambda runner: runner.extended.broadcast_to(VALUE, "cpu").values[0],
    "gather": lambda runner: runner.gather(VALUE, axis=0),
    "gather_to": lambda runner: runner.extended.gather_to(VALUE, "cpu", axis=0),
    "run": lambda runner: runner.run(lambda: VALUE),
    "call_for_each_replica": lambda runner: runner.extended.call_for_each_replica(lambda: VALUE),
}

REFUSED = CROSS_REPLICA | {
    "update_non_slot": lambda runner: runner.extended.update_non_slot(VALUE, lambda: None),
    "make_numpy_dataset": lambda runner: runner.make_numpy_dataset([1, 2]),
}


@pytest.mark.parametrize("call", REFUSED)
@pytest.mark.parametrize("replicas", [1, 2])
def test_calls_for_all_replicas_are_refused_inside_one(call: str, replicas: int) -> None:
    """X06."""
    runner = strategy(replicas)
    advice = "all_gather" if "gather" in call else "merge_call"
    with pytest.raises(RuntimeError, match=rf"requires being in cross-replica context.*use .*{advice}\(\)"):
        runner.run(lambda: REFUSED[call](runner))


@pytest.mark.parametrize("call", CROSS_REPLICA)
def test_they_are_allowed_in_a_scope_in_a_merge_and_without_any(call: str) -> None:
    """X07."""
    runner = strategy(2)
    assert CROSS_REPLICA[call](runner) is VALUE
    assert not ps.has_strategy()
    with runner.scope():
        assert CROSS_REPLICA[call](runner) is VALUE
    assert runner.run(lambda: ps.get_replica_context().merge_call(CROSS_REPLICA[call])) is VALUE  # type: ignore[union-attr]


def test_without_a_scope_they_behave_as_if_inside() -> None:
    """X07."""
    runner = strategy()
    with context.cross_replica(runner, "this"):
        assert ps.get_strategy() is runner
        assert where() == (True, True, False)
    assert where() == (False, False, True)


@pytest.mark.parametrize("call", REFUSED)
def test_they_are_refused_in_the_scope_of_another_strategy(call: str) -> None:
    """X08."""
    one, other = strategy(), strategy()
    with one.scope(), pytest.raises(RuntimeError, match=f"Mixing different strategies.*{one!r}"):
        REFUSED[call](other)


def test_what_needs_a_scope_says_so() -> None:
    """X08."""
    one, other = strategy(), strategy()
    with pytest.raises(RuntimeError, match=r"this: Need to be inside `with strategy.scope\(\):`"):
        context.check_scope(one, "this")
    with one.scope():
        context.check_scope(one, "this")
        with pytest.raises(RuntimeError, match="Mixing different strategies: this"):
            context.check_scope(other, "this")
    one.run(lambda: context.check_scope(one, "this"))


# --- set_strategy


def test_a_strategy_may_be_set_for_a_thread() -> None:
    """X09."""
    one, other = strategy(), strategy()
    ps.set_strategy(one)
    assert ps.get_strategy() is one
    assert where() == (True, True, False)
    ps.set_strategy(other)
    assert ps.get_strategy() is other
    with other.scope():
        assert ps.get_strategy() is other
    assert ps.get_strategy() is other
    ps.set_strategy(None)
    assert where() == (False, False, True)
    ps.set_strategy(None)


@pytest.mark.parametrize("base", [False, True])
def test_a_strategy_is_not_set_inside_a_scope(base: bool) -> None:
    """X09."""
    runner = strategy()
    if base:
        ps.set_strategy(runner)
    with runner.scope():
        for value in (runner, strategy(), None):
            with pytest.raises(RuntimeError, match="set_strategy: this thread is inside a `with strategy.scope"):
                ps.set_strategy(value)
    assert ps.has_strategy() is base
    ps.set_strategy(None)


# --- threads, errors, order


def test_a_new_thread_starts_in_the_default_context() -> None:
    """X10."""
    runner = strategy()
    with runner.scope():
        assert on_a_thread(where) == (False, False, True)
        assert on_a_thread(ps.get_strategy) is not runner
    ps.set_strategy(runner)
    assert on_a_thread(where) == (False, False, True)
    ps.set_strategy(None)
    assert runner.run(lambda: on_a_thread(where)) == (False, False, True)


def test_a_scope_is_left_by_an_exception() -> None:
    """X11."""
    with pytest.raises(KeyError), strategy().scope():
        raise KeyError
    assert not ps.has_strategy()


@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_and_merges_are_left_by_an_exception(replicas: int) -> None:
    """X11."""

    def fail(*_: object) -> None:
        raise KeyError

    runner = strategy(replicas)
    for step in (fail, lambda: ps.get_replica_context().merge_call(fail)):  # type: ignore[union-attr]
        with pytest.raises(KeyError):
            runner.run(step)
        assert context.current() is None


def test_scopes_are_left_in_the_opposite_order() -> None:
    """X11."""
    runner = strategy()
    first, second = context.scope(runner), context.scope(runner)
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="scope nesting error"):
        first.__exit__(None, None, None)
    assert context.current() is None, "what was entered inside it is left with it"
    second.__exit__(None, None, None)
    with strategy().scope():
        assert ps.has_strategy(), "and the thread can go on with any strategy"


def test_a_scope_that_is_left_too_early_leaves_those_around_it_alone() -> None:
    """X11."""
    runner = strategy()
    with runner.scope():
        first, second = runner.scope(), runner.scope()
        first.__enter__()
        second.__enter__()
        with pytest.raises(RuntimeError, match="scope nesting error"):
            first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert ps.get_strategy() is runner
    assert not ps.has_strategy()


def test_one_scope_object_can_be_entered_again() -> None:
    """X03: one after the other, inside itself, on several threads, and as a decorator."""
    runner = strategy()
    scope = runner.scope()

    def inside() -> bool:
        with scope as given:
            return given is ps.get_strategy() is runner

    assert [inside(), inside()] == [True, True]
    with scope:
        assert inside()
        assert on_a_thread(inside)
        assert ps.has_strategy()
    assert not ps.has_strategy()
    assert scope(ps.has_strategy)()
    assert scope(ps.has_strategy)()
    with pytest.raises(KeyError), scope:
        raise KeyError
    with strategy().scope(), pytest.raises(RuntimeError, match="Mixing different"):
        scope.__enter__()
    assert inside()


def test_the_scope_of_the_default_strategy_changes_nothing() -> None:
    """X01: another strategy's scope may be entered inside it, and it may not be entered inside another one."""
    default, runner = ps.get_strategy(), strategy()
    scope = default.scope()
    for _ in range(2):
        with scope as given, scope:
            assert given is ps.get_strategy() is default
            assert where() == (False, False, True)
            with runner.scope():
                assert where() == (True, True, False)
    with runner.scope(), pytest.raises(RuntimeError, match="Mixing different"):
        scope.__enter__()
    assert where() == (False, False, True)


def test_what_was_created_in_a_scope_is_known_by_its_strategy() -> None:
    """X12."""

    class Created:
        def __init__(self, strategy: object) -> None:
            self.strategy = strategy

    one, other = strategy(), strategy()
    assert one.extended.variable_created_in_scope(Created(one)) is True  # type: ignore[arg-type]
    assert one.extended.variable_created_in_scope(Created(other)) is False  # type: ignore[arg-type]
    assert one.extended.variable_created_in_scope(torch.ones(1)) is False  # type: ignore[arg-type]


# --- replica contexts


def test_a_merge_is_asked_for_by_the_replica_that_the_thread_is_in() -> None:
    """E10."""
    runner, kept = strategy(2), []
    runner.run(lambda: kept.append(ps.get_replica_context()))
    with pytest.raises(RuntimeError, match=r"Need to be inside call_for_each_replica\(\)"):
        kept[0].merge_call(lambda _: None)
    with runner.scope(), pytest.raises(RuntimeError, match=r"Need to be inside call_for_each_replica\(\)"):
        kept[0].merge_call(lambda _: None)
    with pytest.raises(RuntimeError, match="Mismatching ReplicaContext"):
        runner.run(lambda: kept[0].merge_call(lambda _: None))
    default = ps.get_replica_context()
    assert default is not None
    with runner.scope(), pytest.raises(RuntimeError, match=r"Need to be inside call_for_each_replica\(\)"):
        default.merge_call(lambda _: None)


def test_a_merge_of_the_default_replica_just_runs_in_cross_replica_context() -> None:
    """E11."""
    default = ps.get_replica_context()
    assert default is not None
    merged = default.merge_call(lambda given, a, b: (given, a, b, where()), (1,), {"b": 2})
    assert merged == (ps.get_strategy(), 1, 2, (False, True, False))


@pytest.mark.parametrize("replicas", [1, 3])
def test_what_a_replica_knows_of_itself(replicas: int) -> None:
    """E18."""
    runner, found = strategy(replicas), []
    runner.run(lambda: found.append(ps.get_replica_context()))
    assert [replica.replica_id_in_sync_group for replica in found] == list(range(replicas))
    assert [replica.devices for replica in found] == [(f"/device:CPU:{index}",) for index in range(replicas)]
    assert {(replica.num_replicas_in_sync, replica.strategy) for replica in found} == {(replicas, runner)}


def test_a_replica_context_can_be_entered_again() -> None:
    """One after the other, and inside itself."""
    replica = ps.ReplicaContext(strategy(2), 1)
    for _ in range(2):
        with replica, replica:
            assert ps.get_replica_context() is replica
        assert context.current() is None
    with replica:
        with replica:
            pass
        assert ps.get_replica_context() is replica


@pytest.mark.parametrize("known", [0, 1, torch.tensor(1), None])
def test_a_replica_context_may_be_entered_by_hand(known: Any) -> None:
    """E18."""
    runner = strategy(2)
    with ps.ReplicaContext(runner, known) as replica:
        assert ps.get_replica_context() is replica
        assert replica.replica_id_in_sync_group is known
        assert replica.devices == (f"/device:CPU:{int(known or 0)}",)
        assert replica.merge_call(lambda given: (given, where())) == (runner, (True, True, False))
    assert not ps.has_strategy()


@pytest.mark.parametrize("known", ["0", 0.0, True, [0]])
def test_an_id_of_another_type_is_refused(known: Any) -> None:
    """E18."""
    with pytest.raises(ValueError, match="replica_id_in_sync_group must be an int, a tensor or None"):
        ps.ReplicaContext(strategy(), known)
