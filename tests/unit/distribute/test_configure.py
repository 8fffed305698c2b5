"""A strategy that becomes part of a cluster after its construction, and copies of strategies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramserver as ps
from paramserver.layout.variables import VariableSpec

CLUSTER = {"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1", "e:1", "f:1"]}


def strategy() -> ps.ParameterServerStrategy:
    """A worker of a cluster."""
    return ps.ParameterServerStrategy(ps.SimpleClusterResolver(ps.ClusterSpec(CLUSTER), task_type="worker", task_id=0))


# --- configure


@pytest.mark.parametrize("cluster", [CLUSTER, ps.ClusterSpec(CLUSTER)])
@pytest.mark.parametrize("devices", [None, ["cpu:0"], ["cpu:0", "cpu:1", "cpu:2"]])
def test_a_local_strategy_becomes_part_of_a_cluster(cluster: Any, devices: list[str] | None) -> None:
    """C20, C22: with the devices that it was constructed with, named or not."""
    found = ps.ParameterServerStrategy(compute_devices=devices)
    found.configure(cluster, "worker", 1)
    assert (str(found.task), found.num_ps, found.is_chief) == ("worker:1", 3, False)
    assert found.extended.parameter_devices == ("/job:ps/task:0", "/job:ps/task:1", "/job:ps/task:2")
    assert found.extended.worker_devices == tuple(
        f"/job:worker/task:1/device:CPU:{index}" for index in range(len(devices or "1"))
    )
    resolver = found.cluster_resolver
    assert (resolver.cluster_spec(), resolver.task_type, resolver.task_id) == (ps.ClusterSpec(CLUSTER), "worker", 1)


def test_the_accelerators_of_a_configured_strategy_were_counted_at_construction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C20."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = ps.ParameterServerStrategy()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found.configure(CLUSTER, "worker", 0)
    assert found.extended.worker_devices == ("/job:worker/task:0/device:GPU:0", "/job:worker/task:0/device:GPU:1")


@pytest.mark.parametrize(
    ("cluster", "task", "message"),
    [
        (CLUSTER, (None, 0), "task_type and task_id"),
        (CLUSTER, ("worker", None), "task_type and task_id"),
        (CLUSTER, ("worker", 7), "worker"),
        (["a:1"], ("worker", 0), "should be a dict"),
    ],
)
def test_a_cluster_that_cannot_work_is_refused_by_configure_as_well(
    cluster: Any, task: tuple[Any, Any], message: str
) -> None:
    """C04, C06, C20: the strategy stays what it was."""
    found = ps.ParameterServerStrategy()
    with pytest.raises(ValueError, match=message):
        found.configure(cluster, *task)
    assert (found.task, found.is_chief, found.num_ps) == (None, True, 1)


@pytest.mark.parametrize("cluster", [None, {}, ps.ClusterSpec({})])
def test_configuring_without_a_cluster_changes_nothing(cluster: Any) -> None:
    """C21: there is no session config to be changed, and nothing else is."""
    found = strategy()
    found.configure(cluster)
    assert (str(found.task), found.num_ps) == ("worker:0", 3)


def test_configure_changes_nothing_that_is_passed_in() -> None:
    """C21, F01."""
    cluster = {job: list(tasks) for job, tasks in CLUSTER.items()}
    resolver = ps.SimpleClusterResolver(ps.ClusterSpec({}))
    devices = ["cpu:0"]
    ps.ParameterServerStrategy(resolver, compute_devices=devices).configure(cluster, "worker", 0)
    assert (cluster, devices) == (CLUSTER, ["cpu:0"])
    assert (bool(resolver.cluster_spec()), resolver.task_type, resolver.task_id) == (False, None, None)


def test_a_strategy_with_variables_is_not_configured() -> None:
    found = ps.ParameterServerStrategy()
    found.connect()
    with pytest.raises(RuntimeError, match="has variables on parameter servers already"):
        found.configure(CLUSTER, "worker", 0)


def test_the_resolver_is_the_one_that_was_given() -> None:
    """C24, as decided."""
    resolver = ps.SimpleClusterResolver(ps.ClusterSpec(CLUSTER), task_type="worker", task_id=0)
    assert ps.ParameterServerStrategy(resolver).cluster_resolver is resolver


# --- copies


def test_a_shallow_copy_is_refused() -> None:
    """C23."""
    with pytest.raises(RuntimeError, match="Must only deepcopy"):
        copy.copy(strategy())


@pytest.mark.parametrize("make", [strategy, lambda: ps.CentralStorageStrategy(["cpu:0", "cpu:1"])])
def test_a_deep_copy_is_a_strategy_of_its_own(make: Callable[[], ps.ParameterServerStrategy]) -> None:
    """C23: its extended points at the copy."""
    original = make()
    duplicate = copy.deepcopy({"it": original, "again": original})["again"]
    assert duplicate is not original
    assert type(duplicate) is type(original)
    assert duplicate.extended._strategy is duplicate
    assert (repr(duplicate), duplicate.cluster, duplicate.task) == (repr(original), original.cluster, original.task)
    assert duplicate.extended.worker_devices == original.extended.worker_devices
    assert duplicate.cluster_resolver is not original.cluster_resolver
    with duplicate.scope(), pytest.raises(RuntimeError, match="Mixing different strategies"), original.scope():
        pytest.fail("they are one")


def test_a_deep_copy_places_its_own_variables() -> None:
    """P01: the turn of the ps tasks belongs to a strategy."""
    variable = VariableSpec("v", (), "float32")
    original = strategy()
    duplicate = copy.deepcopy(original)
    assert [original.place(variable) for _ in range(4)] == [duplicate.place(variable) for _ in range(4)] == [0, 1, 2, 0]


def test_a_deep_copy_trains() -> None:
    runner = copy.deepcopy(ps.CentralStorageStrategy(["cpu:0", "cpu:1"]))
    model = nn.Linear(2, 2)
    _, optimizer = runner.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    runner.run(optimizer.step)
    assert runner.global_step == 1


def test_a_strategy_that_is_connected_is_not_copied() -> None:
    """C23: two would share one connection."""
    original = ps.ParameterServerStrategy()
    original.connect()
    with pytest.raises(RuntimeError, match="is connected to its ps tasks, and a connection cannot be copied"):
        copy.deepcopy(original)
