"""Clusters as an operator of dynamic workers writes them: each task is told of itself and of ps tasks only."""

from __future__ import annotations

import json
from typing import Any

import pytest

import paramserver as ps
from paramserver.cluster import ClusterSpec, TFConfigClusterResolver, find_task, is_chief, server_task, worker_count
from paramserver.errors import ConfigError
from paramserver.estimator import RunConfig

PS = ["p0:1", "p1:1"]


@pytest.fixture(params=["cluster", "sparseCluster"])
def set_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_config(jobs: object, role: str, index: int) -> None:
        config = {request.param: jobs, "task": {"type": role, "index": index}}
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))

    return set_config


@pytest.mark.parametrize("index", [0, 1, 7])
def test_a_worker_knows_itself_and_all_ps_tasks(index: int, set_config: Any) -> None:
    set_config({"worker": {str(index): "w:1"}, "ps": PS}, "worker", index)
    strategy, config = ps.ParameterServerStrategy(), RunConfig(train_distribute=ps.ParameterServerStrategy())
    assert (str(strategy.task), strategy.is_chief, strategy.num_ps) == (f"worker:{index}", index == 0, 2)
    assert (config.task, config.is_chief, config.num_ps_replicas) == (strategy.task, index == 0, 2)
    assert (config.num_worker_replicas, config.global_id_in_cluster) == (0, None)
    assert strategy.input_context == ps.InputContext(0, index, 1)
    assert str(strategy.input_context) == f"input pipeline {index} of an unknown number"


@pytest.mark.parametrize("index", [0, 3])
def test_a_ps_knows_itself_alone(index: int, set_config: Any) -> None:
    set_config({"worker": {}, "ps": ["p:1"]}, "ps", index)
    cluster, task = server_task()
    assert (str(task), cluster.address(task), cluster.is_one_view) == (f"ps:{index}", "p:1", True)


@pytest.mark.parametrize("role", ["chief", "evaluator"])
def test_who_is_told_of_no_ps_is_refused_with_what_to_do(role: str, set_config: Any) -> None:
    set_config({"worker": {}, "ps": []}, role, 0)
    with pytest.raises(ConfigError, match="add 'ps': .* dynamic workers tells no chief or evaluator of them: leave"):
        ps.ParameterServerStrategy()


def test_what_needs_the_number_of_workers_is_refused(set_config: Any) -> None:
    set_config({"worker": {"1": "w:1"}, "ps": PS}, "worker", 1)
    strategy = ps.ParameterServerStrategy()
    with pytest.raises(ConfigError, match="sharding='static' needs the number of workers, .* use sharding='none'"):
        strategy.distribute_dataset([1, 2], ps.InputOptions(sharding="static"))
    assert list(strategy.distribute_dataset([1, 2])) == [1, 2]


def test_a_cluster_that_was_passed_may_lack_workers() -> None:
    cluster = ClusterSpec({"worker": {3: "w:1"}, "ps": PS})
    assert cluster.is_one_view
    assert str(find_task(cluster, "worker", 3)) == "worker:3"
    assert not is_chief(cluster, "worker", 3)
    assert worker_count(cluster, "worker") == 0
    with pytest.raises(ConfigError, match="worker:1 is not in the cluster"):
        find_task(cluster, "worker", 1)


@pytest.mark.parametrize(
    "jobs",
    [
        {"chief": ["c:1"], "worker": {}, "ps": PS},
        {"chief": ["c:1"], "worker": {"0": "w:1"}, "ps": PS},
        {"worker": ["w:1"], "ps": PS},
        {"worker": {"0": "w:1", "1": "v:1"}, "ps": PS},
    ],
)
def test_a_whole_cluster_is_no_view(jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": {"type": "worker", "index": 0}}))
    cluster = TFConfigClusterResolver().cluster_spec()
    assert not cluster.is_one_view
    assert worker_count(cluster, cluster.jobs[0]) > 0


def test_a_view_stays_one_when_it_is_copied_and_compares_by_content() -> None:
    cluster = ClusterSpec.one_view({"worker": {0: "w:1"}, "ps": PS})
    assert ClusterSpec(cluster).is_one_view
    assert cluster == ClusterSpec({"worker": ["w:1"], "ps": PS})
