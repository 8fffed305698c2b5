"""A1, A6: a loop of one's own saves, resumes and ends, alone and in a cluster, with the checkpoints of Estimators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.nn.functional as F
from tests.patience import patience
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.errors import CheckpointError, ConfigError
from paramserver.estimator import Estimator, EstimatorSpec, RunConfig
from paramserver.estimator.checkpoint import load_model, read_values
from paramserver.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.usefixtures("each_strategy_is_a_process")

INPUTS, LABELS = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
TIMEOUT = patience(30.0)


class Net(nn.Module):
    """A table, a tied weight and running statistics; all fill vector registers, so that results are exact."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(20, 32, sparse=True)
        self.first = nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, step: int) -> Tensor:
        ids = torch.arange(step % 7, 32 + step % 7) % 20
        hidden = self.norm(self.first(INPUTS + self.table(ids)))
        return F.mse_loss(self.second(hidden), LABELS)


def built(seed: int = 1) -> tuple[Net, list[optim.Optimizer]]:
    net = Net(seed)
    dense = [parameter for name, parameter in net.named_parameters() if name != "table.weight"]
    return net, [optim.Adam(dense, lr=0.01), optim.SparseAdam(net.table.parameters(), lr=0.01)]


def train(net: Net, optimizers: Any, first: int, count: int = 3) -> None:
    for step in range(first, first + count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(step).backward()
        for optimizer in optimizers:
            optimizer.step()


def contents(net: nn.Module, optimizers: Any) -> list[Any]:
    return [
        {name: tensor.clone() for name, tensor in net.state_dict().items()},
        *(optimizer.state_dict() for optimizer in optimizers),
    ]


def check_same(found: list[Any], expected: list[Any]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@contextlib.contextmanager
def a_cluster(num_ps: int, workers: int = 1) -> Iterator[Callable[..., ps.ParameterServerStrategy]]:
    """Makes the strategies of its tasks."""
    with LocalCluster(ps=num_ps, workers=workers) as cluster, contextlib.ExitStack() as stack:

        def strategy(task: str = "chief:0", **options: Any) -> ps.ParameterServerStrategy:
            made = ps.ParameterServerStrategy(cluster.resolver(task), session_creation_timeout=TIMEOUT, **options)
            stack.callback(made.close)
            return made

        yield strategy


@contextlib.contextmanager
def alone() -> Iterator[Callable[..., ps.ParameterServerStrategy]]:
    yield lambda **options: ps.ParameterServerStrategy(**options)


@pytest.fixture(params=["alone", "1 ps", "3 ps"])
def run(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return alone if request.param == "alone" else lambda: a_cluster(int(request.param[0]))


@pytest.fixture(params=["folder", "memory://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"{request.param.removeprefix('folder')}{tmp_path}/run"
    fsspec.filesystem("memory").store.clear()


# --- saving and restoring


@pytest.mark.parametrize("again", [alone, lambda: a_cluster(2)], ids=["alone", "2 ps"])
@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_a_loop_resumes_where_it_was_saved(run: Any, again: Any, when: str, place: str) -> None:
    with run() as new:
        strategy = new(variable_partitioner=ps.placement.FixedShards(2))
        assert strategy.latest_checkpoint(place) is None
        assert strategy.restore(place) is None
        net, optimizers = strategy.prepare(*built())
        train(net, optimizers, 0)
        path = strategy.save(place)
        assert path == strategy.latest_checkpoint(place) == f"{place}/ckpt-3"
        train(net, optimizers, 3)
        expected = contents(net, optimizers)
    with again() as new:
        strategy = new()
        if when == "before prepare":
            assert strategy.restore(place) == path
            net, optimizers = strategy.prepare(*built(seed=2))
        else:
            net, optimizers = strategy.prepare(*built(seed=2))
            assert strategy.restore(place) == path
        assert strategy.global_step == 3
        train(net, optimizers, 3)
        assert strategy.global_step == 6
        check_same(contents(net, optimizers), expected)


def test_program_variables_are_saved_too(run: Any, tmp_path: Path) -> None:
    for expected in (0, 7):
        with run() as new:
            strategy = new()
            with strategy.scope():
                seen = ps.Variable(0, name="seen")
                strategy.restore(tmp_path)
                strategy.prepare(*built())
                assert seen.read_value() == expected
                seen.assign_add(7)
            strategy.save(tmp_path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    strategy = ps.ParameterServerStrategy()
    net, optimizers = strategy.prepare(*built())
    for step in range(5):
        strategy.save(tmp_path, max_to_keep=2)
        train(net, optimizers, step, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "ckpt-3", "ckpt-4"]
    strategy.save(tmp_path, max_to_keep=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "ckpt-3", "ckpt-4", "ckpt-5"]
    with pytest.raises(ConfigError, match="keep_max"):
        strategy.save(tmp_path, max_to_keep=-1)


def test_a_step_is_saved_anew_when_what_it_holds_has_changed(tmp_path: Path) -> None:
    strategy = ps.ParameterServerStrategy()
    with strategy.scope():
        seen = ps.Variable(1, name="seen")
        strategy.prepare(*built())
        strategy.save(tmp_path)
        seen.assign(2)
        path = strategy.save(tmp_path)
    assert path is not None
    assert read_values(path)["seen"] == 2


def test_one_checkpoint_of_several_can_be_restored(tmp_path: Path) -> None:
    strategy = ps.ParameterServerStrategy()
    net, optimizers = strategy.prepare(*built())
    train(net, optimizers, 0)
    path = strategy.save(tmp_path)
    expected = contents(net, optimizers)
    train(net, optimizers, 3)
    strategy.save(tmp_path)
    assert path is not None
    assert strategy.restore(path) == path
    assert strategy.global_step == 3
    check_same(contents(net, optimizers), expected)


def test_going_back_to_before_the_first_step_forgets_all_state(run: Any, tmp_path: Path) -> None:
    with run() as new:
        strategy = new()
        net, optimizers = strategy.prepare(*built())
        strategy.save(tmp_path)
        before = contents(net, optimizers)
        train(net, optimizers, 0)
        expected = contents(net, optimizers)
        strategy.restore(tmp_path)
        check_same(contents(net, optimizers), before)
        train(net, optimizers, 0)
        check_same(contents(net, optimizers), expected)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    strategy = ps.ParameterServerStrategy()
    with pytest.raises(RuntimeError, match="save: .* has prepared no model"):
        strategy.save(tmp_path)
    with pytest.raises(RuntimeError, match="wait_for_workers: .* has prepared no model"):
        strategy.wait_for_workers()
    with pytest.raises(CheckpointError, match="ckpt-7 is not there"):
        strategy.restore(tmp_path / "ckpt-7")
    strategy.prepare(*built())
    path = strategy.save(tmp_path)
    other = nn.Linear(2, 2)
    strategy = ps.ParameterServerStrategy()
    strategy.restore(tmp_path)
    with pytest.raises(CheckpointError, match="has no variable 'weight'; does it belong to another model"):
        strategy.prepare(other, optim.SGD(other.parameters(), lr=0.1))
    assert path is not None
    Path(path, "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="cut short"):
        strategy.restore(tmp_path)


def test_a_pipelined_model_is_saved_with_the_step_under_way(lane: str, tmp_path: Path) -> None:
    with a_cluster(2) as new:
        strategy, net = new(pipeline=True), nn.Linear(32, 32)
        net, optimizer = strategy.prepare(net, optim.Adam(net.parameters(), lr=0.01))
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(net(INPUTS), LABELS).backward()
            optimizer.step()
        path = strategy.save(tmp_path)
        strategy.refresh()
        assert path == f"{tmp_path}/ckpt-3"
        torch.testing.assert_close(read_values(path), dict(net.state_dict()), rtol=0, atol=0)


# --- with an Estimator


def model_fn(mode: Any) -> EstimatorSpec:
    net = nn.Linear(32, 32)
    return EstimatorSpec(
        mode,
        model=net,
        loss_fn=lambda model, features, labels: F.mse_loss(model(features), labels),
        optimizer=optim.Adam(net.parameters(), lr=0.01),
    )


def the_input() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield INPUTS, LABELS


def own_loop(strategy: ps.ParameterServerStrategy, model_dir: Path, steps: int) -> None:
    net = nn.Linear(32, 32)
    strategy.restore(model_dir)
    net, optimizer = strategy.prepare(net, optim.Adam(net.parameters(), lr=0.01))
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(INPUTS), LABELS).backward()
        optimizer.step()
    strategy.save(model_dir)


@pytest.mark.parametrize("own_loop_first", [True, False])
def test_an_estimator_goes_on_from_a_loop_and_a_loop_from_an_estimator(
    run: Any, own_loop_first: bool, tmp_path: Path
) -> None:
    def estimator(steps: int, folder: Path, strategy: ps.ParameterServerStrategy) -> None:
        Estimator(model_fn, config=RunConfig(model_dir=str(folder), train_distribute=strategy)).train(
            the_input, max_steps=steps
        )

    torch.manual_seed(3)
    estimator(8, tmp_path / "whole", ps.ParameterServerStrategy())
    torch.manual_seed(3)
    mixed = tmp_path / "mixed"
    with run() as new:
        own_loop(new(), mixed, 4) if own_loop_first else estimator(4, mixed, new())
    with run() as new:
        estimator(8, mixed, new()) if own_loop_first else own_loop(new(), mixed, 4)
    whole, found = (read_values(str(folder / "ckpt-8")) for folder in (tmp_path / "whole", mixed))
    torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_a_checkpoint_of_a_loop_loads_into_plain_pytorch(tmp_path: Path) -> None:
    strategy = ps.ParameterServerStrategy()
    net, optimizers = strategy.prepare(*built())
    train(net, optimizers, 0)
    path = strategy.save(tmp_path)
    plain = Net(seed=5)
    assert path is not None
    load_model(plain, path)
    torch.testing.assert_close(plain.state_dict(), net.state_dict(), rtol=0, atol=0)


# --- several workers


def test_only_the_chief_writes(lane: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "paramserver")
    with a_cluster(2, workers=2) as new:
        chief, worker = new(), new("worker:0")
        assert worker.restore(tmp_path) is None
        assert "worker:0 leaves restoring" in caplog.text
        chief.prepare(*built())
        net, optimizers = worker.prepare(*built(seed=2))
        assert worker.save(tmp_path) is None
        assert worker.save(tmp_path) is None
        assert not list(tmp_path.iterdir())
        assert caplog.text.count("worker:0 leaves saving to the chief") == 1
        train(net, optimizers, 0)
        assert chief.save(tmp_path) == f"{tmp_path}/ckpt-3"


@pytest.mark.parametrize("is_there", [True, False], ids=["a checkpoint", "none"])
def test_other_workers_wait_for_a_restore_after_prepare(lane: str, is_there: bool, tmp_path: Path) -> None:
    source = ps.ParameterServerStrategy()
    expected, optimizers = source.prepare(*built(seed=2 if is_there else 1))
    if is_there:
        train(expected, optimizers, 0)
        source.save(tmp_path)
    with a_cluster(2, workers=2) as new, ThreadPoolExecutor(1) as executor:
        chief, worker = new(), new("worker:0")
        net, _ = chief.prepare(*built(seed=1))
        other, _ = worker.prepare(*built(seed=3))
        waiting = executor.submit(worker.restore, tmp_path)
        with pytest.raises(StillWaiting):
            waiting.result(timeout=0.1)
        chief.restore(tmp_path)
        assert waiting.result(TIMEOUT) is None
        assert chief.global_step == worker.global_step == source.global_step
        for each in (net, other):
            torch.testing.assert_close(each.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_worker_that_comes_late_waits_for_no_restore(lane: str, tmp_path: Path) -> None:
    """The chief found no checkpoint and did not call restore, as a program may that asks for the latest one before."""
    with a_cluster(2, workers=2) as new:
        chief = new()
        net, optimizers = chief.prepare(*built())
        train(net, optimizers, 0)
        chief.save(tmp_path)
        worker = new("worker:0")
        other, _ = worker.prepare(*built(seed=2))
        worker.restore(tmp_path)
        torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_a_chief_that_is_started_again_keeps_newer_values(lane: str, when: str, tmp_path: Path) -> None:
    with a_cluster(2, workers=2) as new:
        strategy = new()
        net, optimizers = strategy.prepare(*built())
        train(net, optimizers, 0)
        strategy.save(tmp_path)
        train(net, optimizers, 3)
        expected = contents(net, optimizers)
        assert strategy.client is not None
        strategy.client.close()  # as when its process dies
        again = new()
        if when == "before prepare":
            again.restore(tmp_path)
            net, optimizers = again.prepare(*built(seed=2))
        else:
            net, optimizers = again.prepare(*built(seed=2))
            assert again.restore(tmp_path) is None
        assert again.global_step == 6
        check_same(contents(net, optimizers), expected)
        assert again._checkpoints.last == f"{tmp_path}/ckpt-3", "where a ps that is lost from now on leads back to"
        train(net, optimizers, 6, 1)
        assert again.restore(tmp_path) == f"{tmp_path}/ckpt-3"  # called on purpose, by a chief that trains
        assert again.global_step == 3


# --- the end of a loop


def test_the_chief_waits_for_the_updates_of_the_others(lane: str, tmp_path: Path) -> None:
    with a_cluster(2, workers=2) as new, ThreadPoolExecutor(1) as executor:
        chief, worker = new(), new("worker:0")
        net, optimizers = chief.prepare(*built())
        other, its = worker.prepare(*built(seed=2))
        train(net, optimizers, 0)
        waiting = executor.submit(chief.wait_for_workers)
        train(other, its, 3)
        assert not waiting.done()
        worker.wait_for_workers()  # returns at once
        last = contents(other, its)
        worker.close()
        waiting.result(TIMEOUT)
        assert chief.global_step == 6
        assert chief.save(tmp_path) == f"{tmp_path}/ckpt-6"
        check_same(contents(net, optimizers), last)


def test_a_lost_worker_is_not_waited_for(lane: str) -> None:
    with a_cluster(1, workers=2) as new:
        chief, worker = new(), new("worker:0")
        chief.prepare(*built())
        worker.prepare(*built())
        assert worker.client is not None
        worker.client.close()  # without a word
        chief.wait_for_workers()


def test_one_process_waits_for_nobody() -> None:
    strategy = ps.ParameterServerStrategy()
    strategy.prepare(*built())
    strategy.wait_for_workers()
