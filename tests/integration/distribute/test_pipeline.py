"""The pipelined step: it trains exactly as plain PyTorch does whose every update comes one step late."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # as everybody calls it
from tests.patience import patience
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.errors import UnavailableError
from paramserver.testing.local_cluster import LocalCluster

STEPS = 6
RULES = [
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.Adam, {"lr": 0.01}),
    (optim.Adagrad, {"lr": 0.1}),
]


@pytest.fixture(params=["auto", "tcp"])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    monkeypatch.setenv("PARAMSERVER_LANE", request.param)
    with LocalCluster(ps=2, workers=2, grace=0) as cluster:
        yield cluster


def pipelined(cluster: LocalCluster, task: str = "chief:0", **options: Any) -> ps.ParameterServerStrategy:
    return ps.ParameterServerStrategy(
        cluster.resolver(task), pipeline=True, session_creation_timeout=patience(30), **options
    )  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


def batches(count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def compute(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def train(model: Any, optimizer: Any, count: int = 1) -> None:
    for batch in batches(count):
        optimizer.zero_grad()
        compute(model, batch)
        optimizer.step()


def late(model: nn.Module, optimizer: optim.Optimizer, schedule: Any) -> list[dict[str, Tensor]]:
    """The parameters after each step, where every gradient is of the parameters without the last update."""
    history, computing = [], copy.deepcopy(model)
    for batch in batches():
        computing.zero_grad()
        compute(computing, batch)
        with torch.no_grad():
            for own, other in zip(computing.parameters(), model.parameters(), strict=True):
                own.copy_(other)
                other.grad = own.grad.clone() if own.grad is not None else None
        optimizer.step()
        schedule.step()
        history.append(copy.deepcopy(computing.state_dict()))
    return history


def decayed(optimizer: Any) -> optim.lr_scheduler.LRScheduler:
    return optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


@pytest.mark.parametrize(("rule", "settings"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_it_equals_plain_pytorch_with_late_updates(
    rule: Callable[..., optim.Optimizer], settings: dict[str, Any], cluster: LocalCluster
) -> None:
    """Clipping, a schedule and running statistics included."""
    model = net()
    optimizer = rule(model.parameters(), **settings)
    expected = late(model, optimizer, decayed(optimizer))
    strategy, model = pipelined(cluster), net()
    prepared_model, prepared = strategy.prepare(model, rule(model.parameters(), **settings))
    schedule = decayed(prepared)
    for batch, state in zip(batches(), expected, strict=True):
        prepared.zero_grad()
        compute(prepared_model, batch)
        prepared.step()
        schedule.step()
        torch.testing.assert_close(prepared_model.state_dict(), state)
    strategy.close()


@pytest.mark.parametrize("compute_devices", [["cpu:0"], ["cpu:0", "cpu:1"]], ids=["one replica", "two"])
def test_replicas_of_the_same_batch_train_as_one(compute_devices: list[str], cluster: LocalCluster) -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    expected = late(model, optimizer, decayed(optimizer))[-1]
    strategy = pipelined(cluster, compute_devices=compute_devices)
    model, prepared = strategy.prepare(model := net(), optim.SGD(model.parameters(), lr=0.1))
    schedule = decayed(prepared)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        prepared.zero_grad()
        compute(model, batch)
        prepared.step()

    for batch in batches():
        strategy.run(step, args=(batch,))
        schedule.step()
    torch.testing.assert_close(model.state_dict(), expected)
    strategy.close()


def test_the_extra_staleness_is_told(cluster: LocalCluster) -> None:
    strategy = pipelined(cluster)
    model, optimizer = strategy.prepare(model := net(), optim.SGD(model.parameters(), lr=0.1))
    told = []
    for _ in range(4):
        train(model, optimizer)
        told.append((optimizer.last_push.global_step, optimizer.last_push.staleness))
    assert told == [(1, 0), (2, 0), (3, 1), (4, 1)]  # of the push before, whose values had the update before that one
    strategy.close()


def test_the_global_step_is_exact_and_saving_waits_for_what_is_under_way(cluster: LocalCluster, tmp_path: Path) -> None:
    strategy = pipelined(cluster)
    model, optimizer = strategy.prepare(model := net(), optim.SGD(model.parameters(), lr=0.1))
    client = strategy.connect()
    train(model, optimizer, 3)
    assert (strategy.global_step, client.read_global_step()) == (3, 3)
    client.save(str(tmp_path))
    assert [status.updates for status in client.status()] == [3, 3]
    assert strategy.refresh() == 3
    train(model, optimizer, 2)
    assert strategy.global_step == 5
    strategy.close()


def test_refresh_brings_the_last_update(cluster: LocalCluster) -> None:
    strategy = pipelined(cluster)
    model, optimizer = strategy.prepare(model := net(), optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    assert torch.equal(model[0].weight, before["0.weight"])
    strategy.refresh()
    assert not torch.equal(model[0].weight, before["0.weight"])
    strategy.close()


def test_what_others_change_buffers_by_is_added(cluster: LocalCluster) -> None:
    """Both count the batches they have seen; in the end every one of them has been counted once."""
    chief, worker = pipelined(cluster), pipelined(cluster, "worker:0")
    trained = [each.prepare(model := net(), optim.SGD(model.parameters(), lr=0.1)) for each in (chief, worker)]
    for _ in range(3):
        for model, optimizer in trained:
            train(model, optimizer)
    for each in (chief, worker):
        each.refresh()
    for each, (model, _) in zip((chief, worker), trained, strict=True):
        each.refresh()
        assert int(model[1].num_batches_tracked) == 6
        each.close()


def test_infinite_statistics_stay_what_they_are(cluster: LocalCluster) -> None:
    strategy = pipelined(cluster)
    model, optimizer = strategy.prepare(model := net(), optim.SGD(model.parameters(), lr=0.1))
    model[1].running_mean[0] = torch.inf
    train(model, optimizer, 3)
    model[1].running_mean[0] = 2.0
    train(model, optimizer, 3)
    strategy.refresh()
    assert model[1].running_mean.isfinite().all()
    strategy.close()


def test_several_optimizers_take_turns(cluster: LocalCluster) -> None:
    strategy, model = pipelined(cluster), net()
    first = optim.SGD(model[0].parameters(), lr=0.1)
    second = optim.Adam([*model[1].parameters(), *model[3].parameters()], lr=0.1)
    model, optimizers = strategy.prepare(model, [first, second])
    before = copy.deepcopy(model.state_dict())
    for batch in batches(3):
        for optimizer in optimizers:
            model.zero_grad()
            compute(model, batch)
            optimizer.step()
    assert strategy.refresh() == 3
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    strategy.close()


def test_a_lost_ps_is_told_by_the_step_after_it_or_by_close(cluster: LocalCluster) -> None:
    strategy = pipelined(cluster)
    model, optimizer = strategy.prepare(model := net(), optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, 2)
    strategy.refresh()
    cluster.servers[1].stop()
    train(model, optimizer)  # its push is under way
    with pytest.raises(UnavailableError, match="ps:1"):
        train(model, optimizer)
    strategy.close("failed")


def test_without_a_cluster_it_changes_nothing() -> None:
    histories = []
    for pipeline in (False, True):
        strategy, model = ps.ParameterServerStrategy(pipeline=pipeline), net()
        model, optimizer = strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))
        train(model, optimizer, STEPS)
        histories.append(model.state_dict())
    torch.testing.assert_close(*histories, rtol=0, atol=0)


def test_an_estimator_ends_at_its_step_with_all_of_it_saved(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment("chief:0").items():
        monkeypatch.setenv(name, value)

    def model_fn(mode: ps.estimator.ModeKeys) -> ps.estimator.EstimatorSpec:
        model = net()
        return ps.estimator.EstimatorSpec(
            mode, model=model, loss_fn=lambda model, x, y: F.cross_entropy(model(x), y),
            optimizer=optim.SGD(model.parameters(), lr=0.1),
        )  # fmt: skip

    strategy = ps.ParameterServerStrategy(pipeline=True, session_creation_timeout=patience(30))
    config = ps.estimator.RunConfig(
        model_dir=str(tmp_path), train_distribute=strategy, save_checkpoints_steps=2, log_step_count_steps=None
    )
    steps: list[int] = []

    class Steps(ps.estimator.TrainingHook):
        def after_run(self, context: Any, values: Any) -> None:
            steps.append(values.global_step)

    estimator = ps.estimator.Estimator(model_fn, config=config)
    ps.estimator.train_and_evaluate(
        estimator,
        ps.estimator.TrainSpec(lambda: batches(100), hooks=[Steps()], max_steps=5),
        ps.estimator.EvalSpec(lambda: batches(1)),
    )
    assert steps == [1, 2, 3, 4, 5]
    assert {"ckpt-0", "ckpt-2", "ckpt-4", "ckpt-5"} <= {path.name for path in tmp_path.iterdir()}
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    computing = copy.deepcopy(model)
    for batch in batches(5):
        computing.zero_grad()
        F.cross_entropy(computing(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        for own, other in zip(computing.parameters(), model.parameters(), strict=True):
            other.grad = own.grad
            own.data.copy_(other.data)
        optimizer.step()
    torch.testing.assert_close(estimator.get_variable_value("0.weight"), model[0].weight.detach())


def test_a_question_to_one_ps_may_come_between_a_step_and_its_answer(cluster: LocalCluster) -> None:
    """As the Estimator asks for the global step at the end, and as a lookup of a table asks some of the ps tasks."""
    strategy, model = pipelined(cluster), net()
    model, prepared = strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))  # type: ignore[assignment]
    train(model, prepared)
    assert strategy.client is not None
    assert strategy.client.read_global_step() == 1
    train(model, prepared)
    assert strategy.client.read_global_step() == 2
    strategy.close()
