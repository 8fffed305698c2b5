"""What stands in the place of those lines of the contract that speak of graphs and sessions (docs/decisions/0009)."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from torch import nn, optim

import paramserver as ps


@pytest.fixture(params=[1, 2])
def strategy(request: pytest.FixtureRequest) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(request.param)])


def test_e16_what_replicas_do_is_done_when_run_returns(strategy: ps.CentralStorageStrategy) -> None:
    done: list[int] = []
    strategy.run(lambda: done.append(1))
    assert len(done) == strategy.num_replicas_in_sync


def test_e12_i11_functions_and_iterators_need_no_graph(strategy: ps.CentralStorageStrategy) -> None:
    batches = strategy.distribute_dataset([torch.ones(2, 1), torch.ones(2, 1)])

    def merged(batch: torch.Tensor) -> torch.Tensor:
        context = ps.get_replica_context()
        assert context is not None
        total: torch.Tensor = context.merge_call(lambda own, each: own.reduce("sum", each), args=(batch.sum(),))
        return total

    for _ in range(2):
        assert [float(strategy.reduce("mean", strategy.run(merged, args=(batch,)))) for batch in batches] == [2, 2]


def test_f04_f05_nobody_configures_sessions_or_their_filters() -> None:
    assert not {"session_config", "device_fn", "protocol"} & inspect.signature(ps.estimator.RunConfig).parameters.keys()
    assert list(inspect.signature(ps.ParameterServerStrategy.configure).parameters)[1:] == [
        "cluster_spec", "task_type", "task_id",
    ]  # fmt: skip


def test_p03_p06_p13_a_device_of_the_programs_moves_tensors_and_no_variable(
    strategy: ps.CentralStorageStrategy,
) -> None:
    with strategy.scope(), torch.device("meta"):
        variable = ps.Variable(1.0)
        moved = torch.zeros(1)
        rows = strategy.make_numpy_dataset(np.arange(3.0))
    assert (moved.device.type, variable.value().device.type, rows[0].device.type) == ("meta", "cpu", "cpu")


def test_p11_a_model_lists_each_variable_once_on_every_replica(strategy: ps.CentralStorageStrategy) -> None:
    model = nn.Linear(2, 2)
    model, optimizer = strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))

    def names() -> tuple[list[str], int]:
        return [name for name, _ in model.named_parameters()], len(optimizer.param_groups[0]["params"])

    assert set(map(str, strategy.local_results(strategy.run(lambda: str(names()))))) == {str((["weight", "bias"], 2))}


def test_p12_the_global_step_is_the_same_thing_with_any_number_of_replicas(
    strategy: ps.CentralStorageStrategy,
) -> None:
    model = nn.Linear(2, 2)
    model, optimizer = strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))

    def step() -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    strategy.run(step)
    strategy.run(step)
    assert strategy.global_step == 2


def test_p16_a_table_is_a_variable_like_others(strategy: ps.CentralStorageStrategy) -> None:
    """A variable that serves as a table is placed as every other one."""
    with strategy.scope():
        table = ps.Variable(torch.zeros(100, 8), name="table", aggregation=ps.VariableAggregation.SUM)
    assert table.device in strategy.extended.parameter_devices
    assert table.sparse_read([3, 5]).shape == (2, 8)


def test_v06_a_server_may_be_started_twice() -> None:
    server = ps.Server({"chief": ["127.0.0.1:0"], "ps": ["127.0.0.1:0"]}, "ps", 0)
    server.start()
    target = server.target
    server.start()
    assert server.target == target
    server.stop()


def test_v27_the_evaluators_loop_has_no_listeners() -> None:
    fields = {field.name for field in dataclasses.fields(ps.estimator.EvalSpec)}
    assert fields == {"input_fn", "steps", "name", "hooks", "exporters", "start_delay_secs", "throttle_secs"}


def test_z03_v2_08_v2_09_v2_10_v2_11_v2_12_nothing_collects_updates_or_schedules_functions() -> None:
    """And nobody fetches results of others: V2-13 to V2-17. Every worker runs the program by itself."""
    names = {*ps.__all__, *ps.estimator.__all__, *dir(ps.ParameterServerStrategy)}
    assert not {
        "SyncReplicasOptimizer", "ClusterCoordinator", "RemoteValue", "PerWorkerValues", "ShardedEvaluation",
        "schedule", "join", "fetch", "done", "create_per_worker_dataset", "cache_variable_reads",
    } & names  # fmt: skip


@pytest.mark.parametrize("evaluator", [{}, {"evaluator": ["e:1"]}])
def test_z15_v2_18_the_evaluator_may_be_in_the_cluster(evaluator: dict[str, list[str]]) -> None:
    cluster = ps.ClusterSpec({"chief": ["c:1"], "ps": ["p:1"], **evaluator})
    for task_type in ("chief", "evaluator"):
        strategy = ps.ParameterServerStrategy(ps.SimpleClusterResolver(cluster, task_type=task_type, task_id=0))
        assert strategy.is_chief
