"""all_reduce and all_gather: what replicas combine among themselves, with gradients."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import paramserver as ps
from paramserver.distribute.core.context import scope
from paramserver.distribute.core.values import local_results

Replica = ps.ReplicaContext


def strategy(replicas: int = 2) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])


def on_replicas(fn: Callable[..., Any], *values: Any) -> tuple[Any, ...]:
    """What ``fn(replica, value)`` returns on each of as many replicas as there are values."""
    return local_results(strategy(len(values)).run(lambda value: fn(here(), value), [ps.PerReplica(values)]))


def here() -> Replica:
    replica = ps.get_replica_context()
    assert replica is not None
    return replica


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def counted_merges(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    merge = Replica.merge_call
    monkeypatch.setattr(Replica, "merge_call", lambda self, *args: (calls.append(self), merge(self, *args))[1])
    return calls


def sparse(indices: list[int], values: list[float]) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([indices]), torch.tensor(values), (4,), check_invariants=True)


# --- all_reduce


@pytest.mark.parametrize(("op", "expected"), [("sum", [5.0, 9.0]), ("MEAN", [2.5, 4.5]), (ps.ReduceOp.SUM, [5.0, 9.0])])
def test_every_replica_gets_what_all_give(op: str | ps.ReduceOp, expected: list[float]) -> None:
    """D20."""
    found = on_replicas(lambda replica, given: replica.all_reduce(op, given), leaf(2, 4), leaf(3, 5))
    assert [each.tolist() for each in found] == [expected, expected]


def test_a_nest_comes_back_in_its_structure_by_one_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """D20: batched."""
    merges = counted_merges(monkeypatch)
    nest = {"a": torch.ones(2), "b": (torch.ones(1), [2, True])}
    reduced = strategy().run(lambda: here().all_reduce("sum", nest))
    assert [each.tolist() for each in reduced["a"].values] == [[2.0, 2.0]] * 2
    assert [each.item() for each in reduced["b"][0].values] == [2.0, 2.0]
    assert [leaf.values for leaf in reduced["b"][1]] == [(4, 4), (2, 2)]
    assert len(merges) == 2  # one for each replica


def test_an_object_that_all_replicas_give_counts_for_each() -> None:
    """D20, A06."""
    shared = torch.ones(2)
    found = on_replicas(lambda replica, _: replica.all_reduce("sum", [shared, 1])[0], None, None, None)
    assert [each.tolist() for each in found] == [[3.0, 3.0]] * 3


def test_every_replica_gets_memory_of_its_own() -> None:
    def change(replica: Replica, given: Any) -> Any:
        total = replica.all_reduce("sum", given)
        total += replica.index
        return total

    given = torch.ones(1), torch.ones(1)
    assert [each.item() for each in on_replicas(change, *given)] == [2.0, 3.0]
    assert given == (1.0, 1.0)


def test_sparse_values_are_combined_without_becoming_dense() -> None:
    """D20, D13."""
    give = lambda replica, given: replica.all_reduce("mean", given)  # noqa: E731
    for each in on_replicas(give, sparse([1, 3], [2.0, 4.0]), sparse([1], [6.0])):
        assert (each._indices().tolist(), each._values().tolist()) == ([[1, 3, 1]], [1.0, 2.0, 3.0])


def test_dense_and_sparse_leaves_go_together() -> None:
    """D20: and the dense ones keep their gradients."""

    def step(replica: Replica, given: Any) -> Any:
        both = replica.all_reduce("sum", {"dense": given, "sparse": sparse([0], [1.0])})
        assert both["sparse"]._nnz() == 2
        both["dense"].sum().backward()
        return given.grad

    assert [each.tolist() for each in on_replicas(step, leaf(1), leaf(2))] == [[2.0], [2.0]]


@pytest.mark.parametrize("nest", [[], {}, ()])
def test_an_empty_nest_is_a_merge_of_nothing(nest: Any) -> None:
    """D20."""
    assert strategy().run(lambda: here().all_reduce("sum", nest)) == nest


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_the_gradient_is_combined_as_the_values_are(op: str) -> None:
    """D20: the gradient of an all-sum is the all-sum of the gradients, of a mean the mean."""

    def step(replica: Replica, given: Any) -> Any:
        (replica.all_reduce(op, given) * (10.0 ** (replica.index + 1))).sum().backward()
        return given.grad

    expected = 110.0 if op == "sum" else 55.0
    assert [each.tolist() for each in on_replicas(step, leaf(1, 2), leaf(3, 4))] == [[expected] * 2] * 2


def test_gradients_are_those_of_the_same_thing_in_one_graph() -> None:
    """D20: of the sum of all replicas' losses."""
    values = [leaf(1, -2), leaf(3, 0.5), leaf(-1, 2)]
    total = torch.stack(values).sum(0)
    loss = sum(((total.sin() * (index + 1)) ** 2).sum() for index in range(3))
    expected = torch.autograd.grad(loss, values)  # type: ignore[arg-type]  # a tensor

    def step(replica: Replica, given: Any) -> Any:
        ((replica.all_reduce("sum", given).sin() * (replica.index + 1)) ** 2).sum().backward()
        return given.grad

    torch.testing.assert_close(on_replicas(step, *values), expected)


def test_gradients_have_gradients() -> None:
    """D20: backward is an all_reduce like any other."""

    def step(replica: Replica, given: Any) -> Any:
        loss = (replica.all_reduce("sum", given) ** 3).sum()
        (first,) = torch.autograd.grad(loss, given, create_graph=True)
        first.sum().backward()
        return torch.stack([first.detach(), given.grad])

    # f is 2 s^3 with s = x0 + x1, so f' is 6 s^2, and the sum of both replicas' f' has the derivative 2 * 12 s.
    assert [each.flatten().tolist() for each in on_replicas(step, leaf(1), leaf(2))] == [[54.0, 72.0]] * 2


def test_a_backward_is_one_merge_for_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """D20: an output that a loss does not use counts as 0."""
    merges = counted_merges(monkeypatch)

    def step(replica: Replica, given: Any) -> Any:
        other = leaf(1)
        first, _ = replica.all_reduce("sum", [given, other])
        first.sum().backward()
        return torch.stack([given.grad, other.grad])  # type: ignore[list-item]

    assert [each.flatten().tolist() for each in on_replicas(step, leaf(1), leaf(2))] == [[2.0, 0.0]] * 2
    assert len(merges) == 4


def test_integers_have_no_gradients() -> None:
    given = torch.tensor(1), torch.tensor(2)
    found = on_replicas(lambda replica, value: replica.all_reduce("mean", value), *given)
    assert [(each.item(), each.requires_grad) for each in found] == [(1.5, False)] * 2


def test_without_gradients_no_graph_is_kept() -> None:
    with torch.no_grad():
        found = on_replicas(lambda replica, given: replica.all_reduce("sum", given), leaf(1), leaf(2))
    assert not any(each.requires_grad for each in found)


# --- all_gather


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_every_replica_gets_all_parts_in_order(axis: int) -> None:
    """D21."""
    parts = [torch.arange(4.0).reshape(2, 2) + index for index in range(3)]
    for each in on_replicas(lambda replica, given: replica.all_gather(given, axis), *parts):
        assert torch.equal(each, torch.cat(parts, axis))


def test_parts_may_differ_in_size_and_each_gets_its_slice_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """D21: of the sum of the gradients of all replicas."""
    merges = counted_merges(monkeypatch)

    def step(replica: Replica, given: Any) -> Any:
        gathered = replica.all_gather({"x": given, "y": [given.detach()]}, axis=-1)["x"]
        (gathered * torch.arange(float(len(gathered))) * 10.0**replica.index).sum().backward()
        return given.grad

    found = on_replicas(step, leaf(1, 2), leaf(), leaf(3))
    assert [each.tolist() for each in found] == [[0.0, 111.0], [], [222.0]]
    assert len(merges) == 2 * 3


def test_gathered_gradients_have_gradients() -> None:
    """D21."""

    def step(replica: Replica, given: Any) -> Any:
        loss = (replica.all_gather(given, axis=0) ** 3).sum()
        (first,) = torch.autograd.grad(loss, given, create_graph=True)
        first.sum().backward()
        return given.grad

    assert [each.tolist() for each in on_replicas(step, leaf(1, 2), leaf(3))] == [[12.0, 24.0], [36.0]]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    ("value", "axis", "error", "message"),
    [
        (sparse([0], [1.0]), 0, NotImplementedError, "sparse"),
        (torch.tensor(1.0), 0, ValueError, "rank 1 or more"),
        ([torch.ones(1), 3], 0, ValueError, "rank 1 or more"),
        (torch.ones(2), 1, ValueError, "out of range for value with rank 1"),
        (torch.ones(2), (0,), TypeError, "axis must be an int"),
        ("text", 0, TypeError, "a tensor or a number"),
    ],
)
def test_what_cannot_be_gathered(replicas: int, value: Any, axis: Any, error: type[Exception], message: str) -> None:
    """D21: whatever the number of replicas."""
    with pytest.raises(error, match=message):
        strategy(replicas).run(lambda: here().all_gather(value, axis))


# --- one replica, and what does not fit together


@pytest.mark.parametrize("call", ["all_reduce", "all_gather"])
def test_one_replica_gets_back_what_it_gives(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D20, D21: without a merge."""
    merges = counted_merges(monkeypatch)
    value = {"x": torch.ones(2)}
    collective = {
        "all_reduce": lambda: here().all_reduce("mean", value),
        "all_gather": lambda: here().all_gather(value, axis=0),
    }[call]
    assert strategy(1).run(collective) is value
    assert collective() is value  # the default replica
    assert not merges
    with pytest.raises(ValueError, match="unknown op 'max'"):
        strategy(1).run(lambda: here().all_reduce("max", value))


@pytest.mark.parametrize(
    ("one", "other", "error", "message"),
    [
        (torch.ones(2), torch.ones(3), ValueError, "must have one shape"),
        (torch.ones(4), sparse([0], [1.0]), ValueError, "some replicas have a sparse value and some a dense one"),
        ({"a": 1.0}, {"b": 1.0}, AssertionError, "different keys"),
        ([1.0], [1.0, 2.0], AssertionError, "different lengths"),
        (1.0, [1.0], AssertionError, "a leaf and a structure"),
        (1.0, "text", TypeError, "must be a tensor or a number"),
    ],
)
def test_replicas_give_the_same_kinds_of_things(one: Any, other: Any, error: type[BaseException], message: str) -> None:
    """D20, E06."""
    with pytest.raises(error, match=message):
        on_replicas(lambda replica, given: replica.all_reduce("sum", given), one, other)


def test_replicas_make_the_same_calls() -> None:
    """E08."""

    def either(replica: Replica, given: Any) -> Any:
        return replica.all_reduce(given, torch.ones(1)) if given else replica.all_gather(torch.ones(1), 0)

    with pytest.raises(ValueError, match="all_reduce: the replicas ask for different things"):
        on_replicas(either, "sum", "mean")
    with pytest.raises(ValueError, match="every replica must make the same calls in the same order"):
        on_replicas(either, "sum", None)


@pytest.mark.parametrize("call", ["all_reduce", "all_gather"])
def test_a_collective_is_for_the_replica_that_the_thread_is_in(call: str) -> None:
    """E10."""
    runner, kept = strategy(), []
    collective = {
        "all_reduce": lambda replica: replica.all_reduce("sum", torch.ones(1)),
        "all_gather": lambda replica: replica.all_gather(torch.ones(1), 0),
    }[call]
    runner.run(lambda: kept.append(here()))
    with pytest.raises(RuntimeError, match="Need to be inside"):
        collective(kept[0])
    with pytest.raises(RuntimeError, match="Mismatching ReplicaContext"):
        runner.run(lambda: collective(kept[0]))


# --- where backward may run


def test_a_backward_of_one_replica_alone_is_an_error() -> None:
    """E08: it waits for the others, which have returned."""

    def step(replica: Replica, given: Any) -> None:
        total = replica.all_reduce("sum", given)
        if replica.index == 0:
            total.sum().backward()

    with pytest.raises(RuntimeError, match="different number of replica_context"):
        on_replicas(step, leaf(1), leaf(2))


def test_an_error_of_one_replica_ends_a_backward_of_another() -> None:
    """E09: through autograd's own frames."""
    unwound = []

    def step(replica: Replica, given: Any) -> None:
        total = replica.all_reduce("sum", given)
        if replica.index == 1:
            raise KeyError("mine")
        try:
            total.sum().backward()
        finally:
            unwound.append(replica.index)

    with pytest.raises(KeyError, match="mine"):
        on_replicas(step, leaf(1), leaf(2))
    assert unwound == [0]


def test_a_backward_may_run_on_a_thread_that_autograd_has_for_a_device() -> None:
    """Nobody has entered a replica there."""

    def step(replica: Replica, given: Any) -> Any:
        loss = (replica.all_gather(given, axis=0) * replica.all_reduce("sum", given.sum())).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return given.grad

    # The sum of both losses is 2 * s * s with s = 1 + 2 + 3.
    assert [each.tolist() for each in on_replicas(step, leaf(1, 2), leaf(3))] == [[24.0, 24.0], [24.0]]


@pytest.mark.parametrize("call", ["all_reduce", "all_gather"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_backward_after_the_replicas_have_ended_is_refused(call: str, inside: bool) -> None:
    collective: dict[str, Callable[[Replica, torch.Tensor], Any]] = {
        "all_reduce": lambda replica, value: replica.all_reduce("sum", value),
        "all_gather": lambda replica, value: replica.all_gather(value, 0),
    }
    runner = strategy()
    losses = runner.run(lambda: collective[call](here(), leaf(1)).sum())
    message = "call backward\\(\\) inside the function that run\\(\\) runs"
    if inside:
        with scope(runner), pytest.raises(RuntimeError, match=message):
            runner.reduce("sum", losses).backward()
    else:
        with pytest.raises(RuntimeError, match=message):
            losses.values[1].backward()


def test_a_graph_that_is_let_go_of_lets_go_of_its_replicas() -> None:
    """A loss that run() returns holds a graph, and that the replicas of its collectives."""
    replicas = []

    def step(replica: Replica, given: Any) -> Any:
        replicas.append(weakref.ref(replica))
        return replica.all_reduce("sum", given).sum()

    losses = on_replicas(step, leaf(1), leaf(2))
    assert all(replica() is not None for replica in replicas)
    del losses
    gc.collect()
    assert [replica() for replica in replicas] == [None, None]
