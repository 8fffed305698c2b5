"""run: a function on several replicas in lock step, what each is given, and what becomes of what they return."""

from __future__ import annotations

import collections
import contextvars
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import paramserver as ps
from paramserver.distribute.core.nest import is_nest, leaves, map_leaves
from paramserver.distribute.core.values import DistributedValues, regroup, select_replica


class Pair(NamedTuple):
    """A named tuple."""

    left: Any
    right: Any


class Failed(Exception):  # noqa: N818
    """What the tests raise."""


def strategy(replicas: int = 2) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])


def here() -> ps.ReplicaContext:
    replica = ps.get_replica_context()
    assert replica is not None
    return replica


def merge(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return here().merge_call(fn, args, kwargs)


# --- turns


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_every_replica_runs_once_in_a_context_of_its_own(replicas: int) -> None:
    """E01."""
    found: list[tuple[int, ps.ReplicaContext]] = []
    strategy(replicas).run(lambda: found.append((threading.get_ident(), here())))
    assert [replica.index for _, replica in found] == list(range(replicas))
    assert len({id(replica) for _, replica in found}) == replicas


def test_every_replica_has_a_thread() -> None:
    """E01."""
    threads = strategy(3).run(lambda: threading.current_thread().name)
    assert threads.values == ("replica 0", "replica 1", "replica 2")


def test_replicas_take_turns_from_merge_to_merge() -> None:
    """E02, E07: nothing runs beside anything else, and always in the same order."""
    log: list[str] = []

    def step() -> None:
        log.append(f"{here().index} begins")
        for number in range(2):
            merge(lambda _, number: log.append(f"merge {number}"), number)
            log.append(f"{here().index} after {number}")

    strategy().run(step)
    assert log == [
        *("0 begins", "1 begins", "merge 0"),
        *("0 after 0", "1 after 0", "merge 1"),
        *("0 after 1", "1 after 1"),
    ]


def test_a_strategy_hears_of_every_turn() -> None:
    """E02: so that a model holds what the replica has that is running."""
    turns: list[int] = []

    class Heard(ps.CentralStorageStrategy):
        def activate(self, replica: int) -> None:
            turns.append(replica)

    Heard(["cpu:0", "cpu:1"]).run(lambda: merge(lambda _: turns.append(-1)))
    assert turns == [0, 1, 0, -1, 0, 1, 0]
    with pytest.raises(ZeroDivisionError):
        Heard(["cpu:0", "cpu:1"]).run(lambda: 1 // (1 - here().index))
    assert turns[-1] == 0


# --- what each is given


def test_distributed_values_are_taken_apart_and_all_else_is_passed_as_it_is() -> None:
    """E03."""
    same = object()
    batch = {"x": ps.PerReplica([1, 2]), "y": [ps.Mirrored(["m", "m"]), same]}
    seen = strategy().run(lambda a, b: (a["x"], a["y"][0], a["y"][1] is same, b), (batch,), {"b": ps.PerReplica("pq")})
    assert (seen[0].values, seen[1], seen[2], seen[3].values) == ((1, 2), "m", True, ("p", "q"))


def test_a_component_is_not_taken_apart_further() -> None:
    """E03."""
    inner = ps.PerReplica([1, 2])
    assert select_replica(1, ps.PerReplica([None, [inner]])) == [inner]


def test_values_of_too_few_replicas_are_refused() -> None:
    """E03."""
    with pytest.raises(ValueError, match="a PerReplica of 2 values has none for replica 2"):
        strategy(3).run(lambda x: x, [ps.PerReplica([1, 2])])


@pytest.mark.parametrize("args", [torch.zeros(1), 3, "ab", {"a": 1}, None])
@pytest.mark.parametrize("replicas", [1, 2])
def test_positional_arguments_are_a_list_or_a_tuple(args: Any, replicas: int) -> None:
    """E04."""
    with pytest.raises(ValueError, match="positional args must be a list or tuple"):
        strategy(replicas).run(lambda *_: None, args)


def test_an_iterator_s_next_element_is_a_distributed_value() -> None:
    """E17: ``run(fn, (iterator.get_next(),))``."""
    runner = strategy()
    iterator = runner.make_dataset_iterator([torch.tensor([1, 2, 3, 4])])
    halves = runner.run(lambda x: x.tolist(), (iterator.get_next(),))
    assert [each.values for each in halves] == [(1, 3), (2, 4)]


def test_one_replica_gets_its_own_values() -> None:
    """E03."""
    assert strategy(1).run(lambda x, y: (x, y), [ps.PerReplica([1])], {"y": [ps.Mirrored([2])]}) == (1, [2])


# --- what they return


def test_what_replicas_return_is_put_together_leaf_by_leaf() -> None:
    """E05: in lists, tuples, named tuples and dicts, also those that remember an order."""
    shared = torch.ones(1)
    returned = strategy().run(
        lambda x: {"pair": Pair(x, [shared]), "ordered": collections.OrderedDict(b=x + 1, a=None)},
        [ps.PerReplica([1, 2])],
    )
    assert isinstance(returned["pair"], Pair)
    assert returned["pair"].left.values == (1, 2)
    assert returned["pair"].right[0] is shared
    assert list(returned["ordered"]) == ["b", "a"]
    assert isinstance(returned["ordered"]["b"], ps.PerReplica)
    assert returned["ordered"]["a"] is None


def test_one_replica_returns_what_the_function_returns() -> None:
    """E05."""
    value = {"x": [torch.ones(1)]}
    assert strategy(1).run(lambda: value) is value


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([1], [1, 2], "different lengths: a list of length 1 and a list of length 2"),
        ([1], (1,), "different types: a list of length 1 and a tuple of length 1"),
        ({"a": 1}, {"b": 1}, r"different keys: a dict with keys \['a'\] and a dict with keys \['b'\]"),
        (1, [1], "a leaf and a structure: 1 and a list of length 1"),
        ([1], 1, "different types: a list of length 1 and 1"),
        ({"a": [1]}, {"a": [1, 2]}, "different lengths"),
        (Pair(1, 2), (1, 2), "different types: a Pair of length 2 and a tuple of length 2"),
    ],
)
def test_structures_that_differ_are_refused_naming_both(one: Any, other: Any, message: str) -> None:
    """E06."""
    with pytest.raises(AssertionError, match=message):
        strategy().run(lambda x: x, [ps.PerReplica([one, other])])


@pytest.mark.parametrize(
    ("value", "expected"), [(ps.PerReplica([1, 2]), (1, 2)), (ps.Mirrored("a"), ("a",)), (3, (3,))]
)
def test_local_results(value: Any, expected: tuple[Any, ...]) -> None:
    """E15."""
    assert strategy().local_results(value) == expected


def test_a_run_is_shown_by_its_components() -> None:
    assert repr(ps.PerReplica([1, "b"])) == "PerReplica:{\n  0: 1\n  1: 'b'\n}"


# --- merges


def test_a_merge_runs_once_on_the_calling_thread_with_what_all_replicas_give() -> None:
    """E07."""
    threads: list[int] = []
    runner = strategy()

    def merged(given: Any, differs: Any, same: Any, *, named: Any) -> Any:
        threads.append(threading.get_ident())
        assert given is runner
        return {"sum": sum(differs.values), "own": ps.PerReplica(["a", "b"]), "same": same, "named": named["x"].values}

    def step(x: int) -> Any:
        found = merge(merged, x, "same", named={"x": x})
        return found["sum"], found["own"], found["same"], found["named"]

    total, own, same, named = runner.run(step, [ps.PerReplica([1, 2])])
    assert (total, own.values, same, named) == (3, ("a", "b"), "same", (1, 2))
    assert threads == [threading.get_ident()]


def test_a_merge_of_one_replica_gets_what_it_gives() -> None:
    """E07."""
    assert strategy(1).run(lambda: merge(lambda _, x: x + 1, 1)) == 2


@pytest.mark.parametrize("extra", [0, 1])
def test_replicas_that_merge_a_different_number_of_times(extra: int) -> None:
    """E08."""

    def step() -> None:
        merge(lambda _: None)
        if here().index == extra:
            merge(lambda _: None)

    with pytest.raises(RuntimeError, match=r"different number of replica_context\(\).merge_call\(\) calls: [01] had"):
        strategy().run(step)


def raise_in(index: int) -> None:
    if here().index == index:
        raise Failed(index)


def fail(*_: object) -> None:
    raise Failed


@pytest.mark.parametrize(
    "step",
    [
        lambda: raise_in(0),
        lambda: raise_in(1),
        lambda: (merge(lambda _: None), raise_in(0)),
        lambda: (merge(lambda _: None), raise_in(1)),
        lambda: (raise_in(1), merge(lambda _: None)),
        lambda: merge(fail),
        lambda: merge(lambda given: given.run(fail)),
        lambda: merge(lambda given: given.run(lambda: merge(fail))),
    ],
)
def test_what_goes_wrong_surfaces_and_ends_all_replicas(step: Callable[[], Any]) -> None:
    """E09."""
    before = set(threading.enumerate())
    with pytest.raises(Failed):
        strategy(3).run(step)
    assert set(threading.enumerate()) == before


def test_replicas_that_wait_are_unwound_and_pass_nothing_on() -> None:
    """E09: their `finally` runs, also one that merges; their `except Exception` does not."""
    log: list[str] = []

    def step() -> None:
        raise_in(2)
        try:
            merge(lambda _: None)
            log.append("went on")
        except Exception:  # noqa: BLE001
            log.append("caught")
        finally:
            log.append(f"{here().index} unwound")
            if here().index:
                merge(lambda _: None)

    with pytest.raises(Failed):
        strategy(3).run(step)
    assert log == ["0 unwound", "1 unwound"]


def test_replicas_behind_the_one_that_fails_do_not_start() -> None:
    """E02, E09."""
    started: list[int] = []

    def step() -> None:
        started.append(here().index)
        raise_in(1)

    with pytest.raises(Failed):
        strategy(3).run(step)
    assert started == [0, 1]


def test_an_interrupt_passes_through() -> None:
    """E09: no Exception, either."""

    def step() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        strategy().run(step)


def test_run_inside_a_merge_is_legal_and_inside_a_replica_it_is_not() -> None:
    """E13."""
    runner = strategy()
    nested = runner.run(lambda: merge(lambda given: given.run(lambda: here().index)))
    assert nested.values == (0, 1)
    with pytest.raises(RuntimeError, match="run requires being in cross-replica context"):
        runner.run(lambda: runner.run(lambda: None))


# --- what a thread inherits

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="default")


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    ("enter", "look"),
    [
        (torch.no_grad, torch.is_grad_enabled),
        (torch.inference_mode, torch.is_inference_mode_enabled),
        (lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.is_autocast_enabled("cpu")),
        (lambda: torch.autocast("cpu", torch.float16), lambda: torch.get_autocast_dtype("cpu")),
        (lambda: torch.device("meta"), lambda: torch.empty(0).device.type),
    ],
    ids=["no_grad", "inference_mode", "autocast", "dtype of autocast", "default device"],
)
def test_replicas_inherit_the_state_of_torch(replicas: int, enter: Any, look: Callable[[], Any]) -> None:
    """E14."""
    outside = look()
    with enter():
        inside = look()
        assert inside != outside
        assert set(strategy().local_results(strategy(replicas).run(lambda: (look(),))[0])) == {inside}
    assert look() == outside


def test_replicas_inherit_context_variables_and_keep_changes_to_themselves() -> None:
    """E14."""

    def step() -> str:
        found = VARIABLE.get()
        VARIABLE.set(f"of replica {here().index}")
        merge(lambda _: None)
        return f"{found}, {VARIABLE.get()}"

    token = VARIABLE.set("outside")
    assert strategy().run(step).values == ("outside, of replica 0", "outside, of replica 1")
    assert VARIABLE.get() == "outside"
    VARIABLE.reset(token)


def test_what_a_replica_changes_of_torch_ends_with_it() -> None:
    """E14."""
    strategy().run(lambda: torch.set_grad_enabled(False))
    assert torch.is_grad_enabled()


def test_a_backward_inside_replicas_adds_up_in_shared_weights() -> None:
    weight = torch.ones(1, requires_grad=True)
    strategy().run(lambda x: (weight * x).sum().backward(), [ps.PerReplica([torch.ones(1), 3 * torch.ones(1)])])
    assert weight.grad is not None
    assert weight.grad.item() == 4.0


# --- nests and values by themselves


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ([1], True),
        ((), True),
        ({}, True),
        (Pair(1, 2), True),
        (collections.OrderedDict(), True),
        (torch.Size([1]), False),
        ("text", False),
        ({1}, False),
        (torch.ones(1), False),
        (None, False),
        (ps.PerReplica([1]), False),
    ],
)
def test_what_is_a_nest(structure: Any, expected: bool) -> None:
    assert is_nest(structure) is expected


def test_a_structure_in_which_nothing_changes_is_returned_itself() -> None:
    structure = {"a": [1, Pair("x", (2,))], "b": {}}
    assert map_leaves(lambda leaf: leaf, structure) is structure
    changed = map_leaves(lambda leaf: 3 if leaf == 2 else leaf, structure)
    assert changed == {"a": [1, Pair("x", (3,))], "b": {}}
    assert changed["b"] is structure["b"]
    assert structure["a"][1].right == (2,)


def test_a_dict_of_another_class_keeps_its_class_and_what_it_has() -> None:
    structure = collections.defaultdict(list, a=1)
    changed = map_leaves(lambda leaf: leaf + 1, structure)
    assert (changed, changed.default_factory) == ({"a": 2}, list)


def test_leaves_come_in_order_whatever_the_order_of_keys_in_the_others() -> None:
    assert leaves({"b": 1, "a": [2, Pair(3, 4)]}) == [1, 2, 3, 4]
    assert map_leaves(lambda *each: each, {"b": 1, "a": 2}, {"a": 3, "b": 4}) == {"b": (1, 4), "a": (2, 3)}


def test_structures_that_are_put_together_and_selected_from_come_back() -> None:
    """E03 and E05 are each other's inverse."""
    structures = [{"x": [index], "y": (index + 10, None)} for index in range(3)]
    together = regroup(structures)
    assert together["y"][1] is None
    assert [select_replica(index, together) for index in range(3)] == structures


def test_values_of_nothing_are_refused() -> None:
    """D12."""
    with pytest.raises(ValueError, match="DistributedValues must be non-empty"):
        DistributedValues([])
