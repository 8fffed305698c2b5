"""CentralStorageStrategy: variables in one place of one process, replicas on several devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paramserver as ps

CLUSTER = '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}'


def test_all_variables_lie_on_one_device() -> None:
    """H01."""
    extended = ps.CentralStorageStrategy(["cpu:0", "cpu:1", "cpu:2"], "cpu:0").extended
    assert extended.parameter_devices == ("/device:CPU:0",)
    assert extended.worker_devices == ("/device:CPU:0", "/device:CPU:1", "/device:CPU:2")
    assert extended.worker_devices_by_replica == tuple((device,) for device in extended.worker_devices)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_outside_of_any_scope_returns_what_the_replicas_return(replicas: int) -> None:
    """H01, H05: it enters the scope by itself."""
    strategy = ps.CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])

    def fn(number: int) -> tuple[int, bool]:
        return number + ps.get_replica_context().index, ps.get_strategy() is strategy

    found = strategy.run(fn, [10])
    assert strategy.local_results(found[0]) == tuple(range(10, 10 + replicas))
    assert strategy.local_results(found[1])[0] is True
    assert not ps.has_strategy()


def test_it_does_not_look_for_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", CLUSTER)
    strategy = ps.CentralStorageStrategy()
    assert (strategy.task, bool(strategy.cluster), strategy.num_ps) == (None, False, 1)


@pytest.mark.parametrize(
    ("count", "compute", "variables"),
    [
        (0, ("/device:CPU:0",), "/device:CPU:0"),
        (1, ("/device:GPU:0",), "/device:GPU:0"),
        (2, ("/device:GPU:0", "/device:GPU:1"), "/device:CPU:0"),
    ],
)
def test_a_number_of_gpus(count: int, compute: tuple[str, ...], variables: str) -> None:
    """H04."""
    extended = ps.CentralStorageStrategy.from_num_gpus(count).extended
    assert (extended.worker_devices, extended.parameter_devices) == (compute, (variables,))


def test_its_task_does_everything() -> None:
    """H04: it initializes, checkpoints and writes summaries; F03: nobody else shares its state."""
    strategy = ps.CentralStorageStrategy()
    extended = strategy.extended
    assert (extended.should_init, extended.should_checkpoint, extended.should_save_summary) == (True, True, True)
    assert strategy.is_chief


def test_models_of_two_strategies_share_nothing() -> None:
    """F03: without a cluster, state belongs to one strategy."""
    found = []
    for lr in (0.1, 0.2):
        strategy = ps.CentralStorageStrategy(["cpu:0", "cpu:1"])
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        _, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

        strategy.run(step)
        found.append((model.weight, strategy.global_step))
    assert [(weight.tolist(), steps) for weight, steps in found] == [
        ([[pytest.approx(0.9)] * 2], 1),
        ([[pytest.approx(0.8)] * 2], 1),
    ]


def test_options_are_those_of_a_strategy_with_parameter_servers() -> None:
    strategy = ps.CentralStorageStrategy(variable_placement=ps.placement.Greedy(), session_creation_timeout=5)
    assert strategy.session_creation_timeout == 5
    with pytest.raises(TypeError, match="cluster_resolver"):
        ps.CentralStorageStrategy(cluster_resolver=ps.SimpleClusterResolver(ps.ClusterSpec({})))
