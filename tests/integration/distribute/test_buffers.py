"""Buffers that several workers, or several replicas of one, change: each by its policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.patience import patience
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.estimator.checkpoint import read_values
from paramserver.testing.local_cluster import LocalCluster

LANES = ["auto", "tcp"]


class Model(nn.Module):
    """Buffers of which a test chooses the policy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("value", torch.tensor([1.0, 2.0]))
        self.register_buffer("is_set", torch.tensor(False))
        self.register_buffer("pointer", torch.tensor([0]))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weight


@contextlib.contextmanager
def workers(lane: str, monkeypatch: pytest.MonkeyPatch, policy: str, **options: Any) -> Iterator[list[Any]]:
    """Two workers: the strategy, model and optimizer of each; the chief is the first."""
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with LocalCluster(ps=2, workers=2) as cluster, contextlib.ExitStack() as stack:
        found = []
        for task in ("chief:0", "worker:0"):
            strategy = ps.ParameterServerStrategy(
                cluster.resolver(task), session_creation_timeout=patience(30), **options
            )
            stack.callback(strategy.close)
            model = Model()
            optimizer = optim.SGD(model.parameters(), lr=0.0)
            found.append((strategy, *strategy.prepare(model, optimizer, buffers={"value": policy})))
        yield found


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("policy", "chief", "worker"),
    [
        ("sum", [7.0, 5.0], [7.0, 5.0]),  # moved by [4, 0] and [2, 3]
        ("mean", [4.0, 3.5], [4.0, 3.5]),
        ("last", [3.0, 5.0], [3.0, 5.0]),
        ("own", [5.0, 2.0], [3.0, 5.0]),
    ],
)
def test_each_policy(
    policy: str, chief: list[float], worker: list[float], lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workers(lane, monkeypatch, policy) as ((strategy, one, one_optimizer), (_, other, other_optimizer)):
        one.value += torch.tensor([4.0, 0.0])
        other.value = other.value + torch.tensor([2.0, 3.0])
        one_optimizer.step()
        other_optimizer.step()
        one_optimizer.step()
        assert one.value.tolist() == chief
        assert other.value.tolist() == worker
        strategy.refresh()
        assert one.value.tolist() == chief, "what the ps tasks hold, and a checkpoint will, is the chief's"


@pytest.mark.parametrize("lane", LANES)
def test_a_flag_and_a_pointer_that_one_worker_sets_are_set_for_all(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with workers(lane, monkeypatch, "last") as ((strategy, one, one_optimizer), (_, other, other_optimizer)):
        other.is_set = torch.tensor(True)
        other.pointer.fill_(5)
        one.pointer.fill_(3)
        one_optimizer.step()
        other_optimizer.step()
        one_optimizer.step()
        assert one.is_set.item()
        assert one.pointer.tolist() == other.pointer.tolist() == [5], "a value that one of them has set"
        strategy.refresh()
        assert one.is_set.item()


@pytest.mark.parametrize("policy", ["sum", "last"])
def test_what_a_pipelined_worker_changes_while_a_push_is_under_way_is_pushed_next(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workers("auto", monkeypatch, policy, pipeline=True) as ((_, one, one_optimizer), (strategy, other, _)):
        one.value += 1
        one_optimizer.step()
        one.value = one.value + 10
        one_optimizer.step()
        one.value += 100
        one_optimizer.step()
        one_optimizer.step()
        assert one.value.tolist() == [112.0, 113.0]
        one_optimizer._model.settle()
        strategy.refresh()
        assert other.value.tolist() == [112.0, 113.0]


def test_an_own_buffer_of_a_worker_survives_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    with workers("auto", monkeypatch, "own") as ((_, one, one_optimizer), (strategy, other, _)):
        one.value += 1
        one_optimizer.step()
        other.value += 100
        strategy.refresh()
        assert other.value.tolist() == [101.0, 102.0]


def test_checkpoints_hold_the_chiefs_own_buffers_and_bring_them_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with workers("auto", monkeypatch, "own") as ((chief, one, one_optimizer), (worker, other, other_optimizer)):
        one.value += 1
        other.value += 100
        one_optimizer.step()
        other_optimizer.step()
        saved = chief.save(tmp_path)
        assert read_values(str(saved))["value"].tolist() == [2.0, 3.0]
        one.value += 10
        one_optimizer.step()
        chief.restore(tmp_path)
        worker.refresh()
        assert one.value.tolist() == [2.0, 3.0]
        assert other.value.tolist() == [101.0, 102.0]


# --- replicas of one worker


def in_replicas(policy: str) -> tuple[Any, Any, Any]:
    strategy = ps.CentralStorageStrategy(compute_devices=["cpu:0", "cpu:1"])
    model = Model()
    model.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    return strategy, *strategy.prepare(model, optimizer, buffers={"value": policy})


@pytest.mark.parametrize(("policy", "expected"), [("sum", 2.5), ("mean", 2.5), ("last", 2.0), ("own", None)])
def test_replicas_of_one_worker(policy: str, expected: float | None) -> None:
    strategy, model, optimizer = in_replicas(policy)

    def step() -> None:
        replica = ps.get_replica_context().replica_id_in_sync_group
        model.value += replica + 1
        if replica:
            model.is_set = torch.tensor(True)
        model.weight.sum().backward()
        optimizer.step()

    strategy.run(step)
    values = strategy.local_results(strategy.run(lambda: model.value[0].clone()))
    assert [value.item() for value in values] == ([2.0, 3.0] if expected is None else [expected] * 2)
    flags = strategy.local_results(strategy.run(lambda: model.is_set.clone()))
    assert [flag.item() for flag in flags] == [True, True], "set by the second replica alone"


def test_channels_last_is_kept_on_every_replica() -> None:
    strategy, model, optimizer = in_replicas("sum")

    def step() -> bool:
        model.convolution(torch.ones(1, 3, 4, 4)).sum().backward()
        optimizer.step()
        return model.convolution.weight.is_contiguous(memory_format=torch.channels_last)

    def weight() -> Tensor:
        return model.convolution.weight.detach().clone()

    before = model.convolution.weight.detach().clone()
    for _ in range(2):
        assert all(strategy.local_results(strategy.run(step)))
        one, other = strategy.local_results(strategy.run(weight))
        assert torch.equal(one, other)
        assert not torch.equal(one, before)


def test_parameters_that_are_taken_out_are_not_updated_on_any_replica() -> None:
    strategy, model, optimizer = in_replicas("sum")
    (group,) = optimizer.param_groups

    def step() -> None:
        optimizer.zero_grad()
        (model.weight.sum() + model.convolution(torch.ones(1, 3, 4, 4)).sum()).backward()
        optimizer.step()

    def weights() -> tuple[list[float], list[float]]:
        return model.weight.tolist(), model.convolution.bias.tolist()

    strategy.run(step)
    before = weights()
    everything = list(group["params"])
    group["params"] = [each for each in everything if each is not model.weight]
    strategy.run(step)
    assert weights()[0] == before[0]
    assert weights()[1] != before[1]
    group["params"] = everything
    strategy.run(step)
    assert weights()[0] != before[0]
