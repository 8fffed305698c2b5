"""reduce, reduce_to, gather, broadcast_to: many values into one, and one value on several devices."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch

import paramserver as ps
from paramserver.distribute.reduce.reduction import ReductionToOneDevice

VALUE = torch.arange(6.0).reshape(2, 3)
CLUSTER = {"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1", "e:1"]}
HOST = torch.device("cpu")


def strategy(replicas: int = 2) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])


def task(role: str, index: int) -> ps.ParameterServerStrategy:
    resolver = ps.SimpleClusterResolver(ps.ClusterSpec(CLUSTER), task_type=role, task_id=index)
    return ps.ParameterServerStrategy(resolver, compute_devices=["cpu:0", "cpu:1"])


def per_replica(*values: Any) -> ps.PerReplica[Any]:
    return ps.PerReplica([torch.tensor(value) if isinstance(value, list) else value for value in values])


def sparse(indices: list[int], values: list[Any], size: int = 4) -> torch.Tensor:
    shape = (size, *torch.tensor(values).shape[1:])
    return torch.sparse_coo_tensor(torch.tensor([indices]), torch.tensor(values), shape, check_invariants=True)


class OnPs:
    """What reductions need to know of a variable."""

    device = "/job:ps/task:1"

    def __init__(self) -> None:
        self.value = torch.zeros(2)

    def assign(self, value: torch.Tensor) -> None:
        self.value = value


# --- ops


@pytest.mark.parametrize(
    ("op", "expected"), [("sum", 4.0), ("SUM", 4.0), ("Mean", 2.0), ("MEAN", 2.0), (ps.ReduceOp.MEAN, 2.0)]
)
def test_an_op_goes_by_name_in_any_case_or_as_a_reduce_op(op: str | ps.ReduceOp, expected: float) -> None:
    """D01."""
    assert strategy().reduce(op, per_replica([1.0], [3.0])).tolist() == [expected]


@pytest.mark.parametrize("call", ["reduce", "reduce_to", "batch_reduce_to"])
def test_an_unknown_op_is_refused(call: str) -> None:
    """D01, D12."""
    runner = strategy()
    reduce = {
        "reduce": lambda op: runner.reduce(op, VALUE),
        "reduce_to": lambda op: runner.extended.reduce_to(op, VALUE, "cpu"),
        "batch_reduce_to": lambda op: runner.extended.batch_reduce_to(op, [(VALUE, "cpu")]),
    }[call]
    with pytest.raises(ValueError, match="unknown op 'max'; expected 'sum' or 'mean'"):
        reduce("max")
    with pytest.raises(TypeError, match="got int"):
        reduce(3)


def test_an_empty_per_replica_is_refused() -> None:
    """D12."""
    with pytest.raises(ValueError, match="must be non-empty"):
        ps.PerReplica([])


# --- across replicas


def test_without_an_axis_only_replicas_are_combined() -> None:
    """D02."""
    both = ps.PerReplica([VALUE, 3 * VALUE])
    assert torch.equal(strategy().reduce("sum", both), 4 * VALUE)
    assert torch.equal(strategy().reduce("mean", both, axis=None), 2 * VALUE)


def test_three_replicas_are_added_up() -> None:
    assert strategy(3).reduce("sum", per_replica(1.0, 2.0, 4.0)) == 7.0


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_one_replica_has_nothing_to_combine(op: str) -> None:
    """D11: the value itself, whatever it is."""
    value = {"loss": VALUE, "count": 3, "name": None}
    assert strategy(1).reduce(op, value) is value


def test_a_nest_is_reduced_leaf_by_leaf() -> None:
    """A replica returns a dict of metrics."""
    runner = strategy()
    shards = ps.PerReplica([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    metrics = runner.run(lambda x: {"sum": x.sum(), "sizes": (len(x), [x.max()])}, [shards])
    assert runner.reduce("mean", metrics) == {"sum": 5.0, "sizes": (2, [3.0])}


@pytest.mark.parametrize(
    ("values", "total", "mean"),
    [
        ((1, 2), torch.tensor(3), torch.tensor(1.5)),
        ((1.0, 2.0), torch.tensor(3.0), torch.tensor(1.5)),
        ((True, True), torch.tensor(2), torch.tensor(1.0)),
        ((np.float32(1), np.float32(2)), torch.tensor(3.0), torch.tensor(1.5)),
        ((np.array([1.0]), np.array([2.0])), torch.tensor([3.0]).double(), torch.tensor([1.5]).double()),
        (([1, 2], [3, 5]), torch.tensor([4, 7]), torch.tensor([2.0, 3.5])),
        (([True, False], [True, True]), torch.tensor([2, 1]), torch.tensor([1.0, 0.5])),
    ],
)
def test_numbers_are_values_too_and_a_mean_of_integers_is_a_float(
    values: Any, total: torch.Tensor, mean: torch.Tensor
) -> None:
    torch.testing.assert_close(strategy().reduce("sum", per_replica(*values)), total)
    torch.testing.assert_close(strategy().reduce("mean", per_replica(*values)), mean)


@pytest.mark.parametrize("value", ["text", None, object()])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="must be a tensor or a number"):
        strategy().reduce("sum", ps.PerReplica([value, 1]))


def test_shapes_must_agree_for_nothing_is_broadcast() -> None:
    with pytest.raises(ValueError, match=r"must have one shape, got \[3\], \[1\]"):
        strategy().reduce("sum", ps.PerReplica([torch.ones(3), torch.ones(1)]))


def test_gradients_pass_through_a_reduction() -> None:
    values = [torch.ones(2, requires_grad=True) for _ in range(2)]
    strategy().reduce("mean", ps.PerReplica(values)).sum().backward()
    assert [value.grad.tolist() for value in values if value.grad is not None] == [[0.5, 0.5]] * 2


def test_values_are_not_changed() -> None:
    values = [torch.ones(2), torch.ones(2)]
    strategy().reduce("sum", ps.PerReplica(values))
    assert [value.tolist() for value in values] == [[1.0, 1.0]] * 2


def test_reduce_works_in_a_scope_and_outside_and_its_result_is_on_the_default_device() -> None:
    """D06, X07."""
    runner = strategy()
    with runner.scope():
        inside = runner.reduce("sum", per_replica([1.0], [2.0]))
    outside = runner.reduce("sum", per_replica([1.0], [2.0]))
    assert inside == outside == 3.0
    assert inside.device == HOST
    with torch.device("meta"):
        assert runner.reduce("sum", per_replica([1.0], [2.0])).device.type == "meta"


# --- inside replicas


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), [0, -1], (-2,)])
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_an_axis_is_combined_inside_the_replica(op: str, axis: int | tuple[int, ...] | list[int]) -> None:
    """D03, D04, D05."""
    expected = getattr(torch.stack([VALUE, 3 * VALUE]), op)(0)
    expected = getattr(expected, op)(axis)
    torch.testing.assert_close(strategy().reduce(op, ps.PerReplica([VALUE, 3 * VALUE]), axis), expected)
    torch.testing.assert_close(strategy(1).reduce(op, VALUE, axis), getattr(VALUE, op)(axis))


def test_a_mean_over_batches_of_different_sizes_counts_every_value_once() -> None:
    """D04: a sum of all divided by the number of all, no mean of means."""
    batches = per_replica([1.0, 2.0, 3.0, 4.0], [10.0, 16.0])
    assert strategy().reduce("mean", batches, axis=0) == 6.0
    assert strategy().reduce("sum", batches, axis=0) == 36.0
    assert strategy().reduce("mean", per_replica([1, 2, 3, 4], [10, 17]), axis=0) == pytest.approx(37 / 6)


def test_a_mean_over_two_axes_counts_both() -> None:
    """D04, D05."""
    batches = ps.PerReplica([torch.ones(4, 2, 3), torch.zeros(2, 2, 3)])
    torch.testing.assert_close(strategy().reduce("mean", batches, axis=(0, -1)), torch.full((2,), 2 / 3))


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_no_axes_are_none(op: str) -> None:
    """D02."""
    assert strategy().reduce(op, ps.PerReplica([VALUE, VALUE]), axis=()).shape == VALUE.shape


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_an_axis_out_of_range_is_refused(op: str, axis: int | tuple[int, ...]) -> None:
    """D05."""
    with pytest.raises(ValueError, match="out of range for value with rank 2"):
        strategy(1).reduce(op, VALUE, axis)
    with pytest.raises(ValueError, match="out of range for value with rank 2"):
        strategy().reduce(op, ps.PerReplica([VALUE, VALUE]), axis)


def test_an_axis_that_is_there_twice_is_refused() -> None:
    """D05: it would be counted twice."""
    with pytest.raises(ValueError, match="twice"):
        strategy().reduce("mean", ps.PerReplica([VALUE, VALUE]), (1, -1))


@pytest.mark.parametrize("axis", ["0", 1.0, {0}, (0, "1"), True])
def test_an_axis_that_is_none_is_refused(axis: Any) -> None:
    """D05."""
    with pytest.raises(TypeError, match="axis must be an int or a list or tuple of ints"):
        strategy().reduce("mean", ps.PerReplica([VALUE, VALUE]), axis)


# --- values that are the same for all replicas


def test_a_value_that_is_the_same_for_all_is_its_own_mean() -> None:
    """D09."""
    assert strategy().reduce("mean", VALUE) is VALUE
    assert strategy().extended.reduce_to("mean", VALUE, "cpu:0") is VALUE
    assert torch.equal(strategy().reduce("mean", VALUE, axis=0), VALUE.mean(0))


@pytest.mark.parametrize("value", [VALUE, torch.zeros(2), 1, np.ones(2), None])
def test_a_value_that_is_the_same_for_several_replicas_has_no_sum(value: Any) -> None:
    """D09."""
    for reduce in (strategy().reduce, lambda op, value: strategy().extended.reduce_to(op, value, "cpu:0")):
        with pytest.raises(ValueError, match="cannot be reduced with the given reduce op SUM"):
            reduce("sum", value)


def test_a_sum_over_one_replica_is_the_value() -> None:
    """D09."""
    assert torch.equal(strategy(1).extended.reduce_to("sum", VALUE, "cpu:0"), VALUE)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.zeros(2)])
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_a_sum_of_zeros_is_zero(zero: Any, op: str) -> None:
    """D09."""
    assert not np.any(strategy().reduce(op, zero))


def test_an_object_that_all_replicas_return_is_the_same_for_all() -> None:
    """D09, E05."""
    runner = strategy()
    with pytest.raises(ValueError, match="is not a PerReplica but the same for all 2 replicas"):
        runner.reduce("sum", runner.run(lambda: VALUE))


# --- destinations


@pytest.mark.parametrize(
    "destinations",
    ["cpu:1", "/device:CPU:0", torch.device("cpu"), "/job:ps/task:1", VALUE, OnPs(), per_replica([1.0]), None],
)
def test_a_single_destination_gets_a_plain_value(destinations: Any) -> None:
    """D07, D10."""
    reduced = strategy().extended.reduce_to("sum", per_replica([1.0, 2.0], [3.0, 4.0]), destinations)
    assert isinstance(reduced, torch.Tensor)
    assert (reduced.tolist(), reduced.device) == ([4.0, 6.0], HOST)


@pytest.mark.parametrize("destinations", [ps.PerReplica(["cpu:0", "cpu:1"]), ps.Mirrored([VALUE, OnPs()])])
def test_several_destinations_get_a_mirrored_value(destinations: Any) -> None:
    """D07, D10."""
    reduced = strategy().extended.reduce_to("mean", per_replica([1.0], [3.0]), destinations)
    assert isinstance(reduced, ps.Mirrored)
    assert [each.tolist() for each in reduced.values] == [[2.0], [2.0]]


def test_a_variable_as_a_destination_means_its_device_and_keeps_its_value() -> None:
    """D08."""
    variable = OnPs()
    strategy().extended.reduce_to("sum", per_replica([1.0], [2.0]), variable)
    assert variable.value.tolist() == [0.0, 0.0]


def test_a_ps_stands_for_the_host_whatever_device_of_it_is_named() -> None:
    """D10, D16."""
    reduced = task("worker", 0).extended.reduce_to("sum", per_replica([1.0], [2.0]), "/job:ps/task:0/device:GPU:0")
    assert reduced.device == HOST


def test_values_are_accumulated_on_the_device_of_the_first() -> None:
    """D10: and moved to the destination afterwards."""
    devices: list[str] = []

    def total(tensors: list[torch.Tensor]) -> torch.Tensor:
        devices.extend(tensor.device.type for tensor in tensors)
        return torch.ones(2)

    values = ps.PerReplica([torch.ones(2, device="meta"), torch.ones(2)])
    assert ReductionToOneDevice(accumulation_fn=total).reduce("sum", values, "cpu").device == HOST
    assert devices == ["meta", "meta"]


@pytest.mark.parametrize("destinations", [["cpu:0"], ("cpu:0", "cpu:1")])
def test_destinations_are_no_list(destinations: Any) -> None:
    """D07."""
    for call in (strategy().extended.reduce_to, ReductionToOneDevice().reduce):
        with pytest.raises(AssertionError, match="destinations must not be a"):
            call("sum", per_replica([1.0], [2.0]), destinations)


@pytest.mark.parametrize(
    ("destinations", "message"),
    [
        ("", "destinations can not be empty"),
        (3, "destinations must be one of"),
        ({"cpu"}, "destinations must be one of"),
        ("tpu:0", "names no device"),
    ],
)
def test_destinations_that_are_none_are_refused(destinations: Any, message: str) -> None:
    """D07."""
    for call in (strategy().extended.reduce_to, ReductionToOneDevice().reduce):
        with pytest.raises(ValueError, match=message):
            call("sum", per_replica([1.0], [2.0]), destinations)


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_a_single_component_is_moved_and_not_reduced(op: str) -> None:
    """D11."""
    assert strategy().extended.reduce_to(op, ps.PerReplica([VALUE]), "cpu:0") is VALUE
    moved = ReductionToOneDevice().reduce(op, ps.PerReplica([VALUE]), per_replica("cpu:0", "cpu:1"))
    assert [torch.equal(each, VALUE) for each in moved.values] == [True, True]


# --- sparse


@pytest.mark.parametrize(("op", "values"), [("sum", [1.0, 2.0, 4.0]), ("mean", [0.5, 1.0, 2.0])])
def test_sparse_values_stay_sparse_and_keep_their_duplicates(op: str, values: list[float]) -> None:
    """D13: MEAN divides the values only."""
    reduced = strategy().reduce(op, ps.PerReplica([sparse([3, 1], [1.0, 2.0]), sparse([1], [4.0])]))
    assert reduced.layout is torch.sparse_coo
    assert not reduced.is_coalesced()
    assert (reduced._indices().tolist(), reduced._values().tolist()) == ([[3, 1, 1]], values)


def test_sparse_rows_are_never_made_dense() -> None:
    """D13: a table of 2^40 rows has no room anywhere."""
    rows = 1 << 40
    both = [sparse([rows - 1, 0], [[1.0, 1.0], [2.0, 2.0]], rows), sparse([5], [[4.0, 4.0]], rows)]
    reduced = strategy().extended.reduce_to("mean", ps.PerReplica(both), per_replica("cpu:0", OnPs()))
    assert [(each.shape, each._nnz()) for each in reduced.values] == [((rows, 2), 3)] * 2


def test_a_sparse_and_a_dense_value_do_not_mix() -> None:
    """D13."""
    with pytest.raises(ValueError, match="some replicas have a sparse value and some a dense one"):
        strategy().reduce("sum", ps.PerReplica([sparse([1], [1.0]), torch.ones(4)]))


def test_sparse_shapes_must_agree() -> None:
    """D13."""
    with pytest.raises(ValueError, match=r"must have one shape, got \[4\], \[5\]"):
        strategy().reduce("sum", ps.PerReplica([sparse([1], [1.0]), sparse([1], [1.0], 5)]))


def test_a_sparse_value_has_no_axis_to_combine() -> None:
    """D13."""
    with pytest.raises(NotImplementedError, match="sparse"):
        strategy().reduce("sum", ps.PerReplica([sparse([1], [1.0])] * 2), axis=0)


# --- several at once


def test_a_batch_is_reduced_pair_by_pair_in_order() -> None:
    """D14."""
    extended = strategy().extended
    destinations = ["cpu:0", OnPs(), per_replica("cpu:0", "cpu:1")]
    pairs = [(per_replica([float(number)], [1.0]), where) for number, where in enumerate(destinations)]
    first, second, third = extended.batch_reduce_to("sum", pairs)
    assert (first, second) == (1.0, 2.0)
    assert isinstance(third, ps.Mirrored)
    assert third.values == (3.0, 3.0)
    assert extended.batch_reduce_to("sum", []) == []


@pytest.mark.parametrize("pair", [VALUE, (VALUE,), (VALUE, "cpu", 1), [VALUE, "cpu"]])
def test_a_pair_is_a_pair(pair: Any) -> None:
    """D14."""
    with pytest.raises(ValueError, match="expected pairs"):
        strategy(1).extended.batch_reduce_to("sum", [(VALUE, "cpu"), pair])


# --- other ways to reduce


def test_values_can_be_accumulated_in_another_way_and_elsewhere() -> None:
    """D15."""
    devices: list[torch.device] = []

    def largest(tensors: list[torch.Tensor]) -> torch.Tensor:
        devices.extend(tensor.device for tensor in tensors)
        return torch.stack(tensors).amax(0)

    own = ReductionToOneDevice(reduce_to_device="cpu:1", accumulation_fn=largest)
    assert own.reduce("sum", per_replica([1.0, 5.0], [2.0, 3.0]), "cpu:0").tolist() == [2.0, 5.0]
    assert own.reduce("mean", per_replica([1.0, 5.0], [2.0, 3.0]), "cpu:0").tolist() == [1.0, 2.5]
    assert set(devices) == {HOST}
    pairs = [(per_replica([1.0], [2.0]), "cpu:0"), (per_replica([4.0], [2.0]), "cpu:1")]
    assert [each.item() for each in own.batch_reduce("sum", pairs)] == [2.0, 4.0]


def test_a_reduction_is_checked_and_does_not_change() -> None:
    """D15."""
    with pytest.raises(ValueError, match="names no device"):
        ReductionToOneDevice(reduce_to_device="tpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReductionToOneDevice().reduce_to_device = "cpu"  # type: ignore[misc]


def test_a_reduction_says_where_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    """D22."""
    with caplog.at_level(logging.DEBUG, logger="paramserver.distribute.reduce.reduction"):
        strategy().extended.reduce_to("sum", per_replica([1.0], [2.0]), per_replica("cpu:0", "cpu:1"))
    assert caplog.messages == ["reduce to cpu, then broadcast to cpu, cpu"]


# --- other workers


@pytest.mark.parametrize(
    ("role", "index", "destination"),
    [
        ("worker", 0, "/job:worker/task:1"),
        ("worker", 1, "/job:worker/task:0/device:CPU:0"),
        ("worker", 1, "/job:chief/task:0"),
        ("chief", 0, "/job:worker/task:0"),  # D17
        ("chief", 0, "/job:worker/task:1"),
    ],
)
@pytest.mark.parametrize("call", ["reduce_to", "batch_reduce_to", "gather_to", "broadcast_to"])
def test_nothing_is_reduced_to_another_worker(role: str, index: int, destination: str, call: str) -> None:
    """D16, D17."""
    extended, value = task(role, index).extended, per_replica([1.0], [2.0])
    calls = {
        "reduce_to": lambda to: extended.reduce_to("sum", value, to),
        "batch_reduce_to": lambda to: extended.batch_reduce_to("sum", [(value, "cpu"), (value, to)]),
        "gather_to": lambda to: extended.gather_to(value, to, 0),
        "broadcast_to": lambda to: extended.broadcast_to(VALUE, to),
    }
    for to in (destination, per_replica("cpu:0", destination)):
        with pytest.raises(ValueError, match=f"{call}: Cannot reduce to another worker.*{role}:{index}"):
            calls[call](to)


@pytest.mark.parametrize(
    ("role", "index", "destination"),
    [
        ("worker", 1, "/job:worker/task:1/device:CPU:1"),
        ("chief", 0, "/job:chief/task:0"),
        ("worker", 1, "/job:ps/task:0"),
        ("chief", 0, "/job:ps/task:1"),
        ("worker", 1, "cpu:0"),
        ("worker", 1, OnPs()),
        ("worker", 1, None),
    ],
)
def test_own_devices_and_ps_tasks_are_fine(role: str, index: int, destination: Any) -> None:
    """D16."""
    assert task(role, index).extended.reduce_to("sum", per_replica([1.0], [2.0]), destination) == 3.0


def test_a_chief_may_be_called_master() -> None:
    """C07, D16."""
    value = per_replica([1.0], [2.0])
    with pytest.warns(DeprecationWarning, match="master"), pytest.raises(ValueError, match="another worker"):
        task("worker", 0).extended.reduce_to("sum", value, "/job:master/task:0")


def test_one_process_has_no_other_workers() -> None:
    """D17."""
    assert strategy().extended.reduce_to("sum", per_replica([1.0], [2.0]), "/job:worker/task:7") == 3.0


# --- gather


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_parts_are_gathered_in_the_order_of_the_replicas(axis: int) -> None:
    """D18."""
    parts = [VALUE, VALUE + 10, VALUE - 10]
    assert torch.equal(strategy(3).gather(ps.PerReplica(parts), axis), torch.cat(parts, axis))


def test_parts_may_differ_in_size_along_the_axis() -> None:
    """D18."""
    parts = [torch.ones(2, 1), torch.zeros(2, 0), torch.ones(2, 3)]
    assert strategy(3).gather(ps.PerReplica(parts), axis=1).shape == (2, 4)


def test_a_nest_is_gathered_leaf_by_leaf() -> None:
    """D18."""
    gathered = strategy().gather({"x": per_replica([1, 2], [3]), "y": [7]}, axis=0)
    assert gathered["x"].tolist() == [1, 2, 3]
    assert gathered["y"] == [7]


def test_truth_values_are_gathered_as_they_are() -> None:
    assert strategy().gather(per_replica([True], [False]), axis=0).dtype is torch.bool


@pytest.mark.parametrize("value", [VALUE, 3, "text", sparse([0], [1.0])])
def test_gathering_what_is_the_same_for_all_changes_nothing(value: Any) -> None:
    """D18."""
    assert strategy().gather(value, axis=0) is value
    assert strategy().extended.gather_to(value, "cpu:0", axis=0) is value


@pytest.mark.parametrize(
    ("values", "axis", "error", "message"),
    [
        ([sparse([0], [1.0])] * 2, 0, NotImplementedError, "sparse"),
        ([torch.ones(2).to_sparse(), torch.ones(2)], 0, NotImplementedError, "sparse"),
        ([torch.tensor(1.0)] * 2, 0, ValueError, "rank 1 or more"),
        ([1, 2], 0, ValueError, "rank 1 or more"),
        ([torch.ones(2)] * 2, 1, ValueError, "out of range for value with rank 1"),
        ([torch.ones(2, 2), torch.ones(2, 3)], 0, ValueError, "along axis 0 only, got [2, 2], [2, 3]"),
        ([torch.ones(2, 2), torch.ones(2)], -1, ValueError, "along axis -1 only"),
        ([torch.ones(2)] * 2, None, TypeError, "axis must be an int"),
        ([torch.ones(2)] * 2, (0,), TypeError, "axis must be an int"),
        (["text", "text"], 0, TypeError, "must be a tensor or a number"),
    ],
)
def test_what_cannot_be_gathered(values: list[Any], axis: Any, error: type[Exception], message: str) -> None:
    """D18."""
    with pytest.raises(error) as raised:
        strategy().gather(ps.PerReplica(values), axis)
    assert message in str(raised.value)


def test_gathering_to_several_destinations() -> None:
    """D07, D18."""
    gathered = strategy().extended.gather_to(per_replica([1], [2]), per_replica("cpu:0", "cpu:1"), axis=0)
    assert isinstance(gathered, ps.Mirrored)
    assert [each.tolist() for each in gathered.values] == [[1, 2], [1, 2]]
    with pytest.raises(AssertionError, match="must not be a list"):
        strategy().extended.gather_to(per_replica([1], [2]), ["cpu:0"], axis=0)


def test_gathering_inside_a_replica_is_all_gather() -> None:
    """D18, X06."""
    runner = strategy()
    with pytest.raises(RuntimeError, match=r"gather .*use get_replica_context\(\).all_gather\(\)"):
        runner.run(lambda: runner.gather(VALUE, 0))
    with pytest.raises(RuntimeError, match=r"gather_to.*use get_replica_context\(\).all_gather\(\)"):
        runner.run(lambda: runner.extended.gather_to(VALUE, "cpu", 0))


# --- broadcast


@pytest.mark.parametrize(("destinations", "count"), [("cpu:0", 1), (per_replica("cpu:0", "cpu:1"), 2), ("", 3)])
def test_a_tensor_is_broadcast_as_a_mirrored_value(destinations: Any, count: int) -> None:
    """D19: an empty name means all compute devices."""
    mirrored = strategy(3).extended.broadcast_to(VALUE, destinations)
    assert isinstance(mirrored, ps.Mirrored)
    assert [torch.equal(each, VALUE) for each in mirrored.values] == [True] * count


@pytest.mark.parametrize("number", [3, 0.5])
def test_a_number_is_broadcast_as_it_is(number: float) -> None:
    """D19: its dtype is decided by whoever uses it."""
    assert strategy().extended.broadcast_to(number, "") is number


@pytest.mark.parametrize("destinations", [None, ["cpu:0"], ()])
def test_where_nothing_can_be_broadcast_to(destinations: Any) -> None:
    """D19."""
    with pytest.raises(AssertionError, match="destinations must not be"):
        strategy().extended.broadcast_to(VALUE, destinations)


@pytest.mark.parametrize("value", ["text", None, per_replica([1.0], [2.0])])
def test_what_cannot_be_broadcast(value: Any) -> None:
    """D19."""
    with pytest.raises(TypeError, match="must be a tensor or a number"):
        strategy().extended.broadcast_to(value, "cpu:0")
