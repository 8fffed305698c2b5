"""Evaluation and prediction on several replicas: no batch is left out, and results are those of one (Q14, T20, T21)."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramserver as ps
from paramserver.errors import ConfigError
from paramserver.estimator import (
    Estimator,
    EstimatorSpec,
    EvalSpec,
    ModeKeys,
    RunConfig,
    TrainingHook,
    TrainSpec,
    train_and_evaluate,
)
from paramserver.estimator.evaluate.inference import ModelReplicas, own_strategy


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)


def strategy(replicas: int) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class Seen:
    """A metric that keeps what it was given."""

    def __init__(self) -> None:
        self.updates: list[tuple[list[float], list[float]]] = []

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        self.updates.append((predictions.flatten().tolist(), labels.tolist()))

    def compute(self) -> float:
        return float(len(self.updates))

    def reset(self) -> None:
        self.updates.clear()


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    parts = torch.rand(count, 4, 3, generator=torch.Generator().manual_seed(1))
    return [(part, part.sum(1)) for part in parts]


class Run:
    """An Estimator, and the replicas and the metric of its last evaluation."""

    def __init__(self, model_dir: Path, eval_distribute: Any = None, **config: Any) -> None:
        self.metric = Seen()
        self.threads: list[str] = []
        options = {"save_checkpoints_steps": 100, "log_step_count_steps": None} | config
        run_config = RunConfig(eval_distribute=eval_distribute, **options)
        self.estimator = Estimator(self.model_fn, str(model_dir), run_config)

    def model_fn(self, mode: ModeKeys) -> EstimatorSpec:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return EstimatorSpec(
            mode,
            model=model,
            loss_fn=self.loss,
            predict_fn=self.predict if mode is ModeKeys.PREDICT else None,
            optimizer=optimizer,
            eval_metrics={"seen": self.metric},
        )

    def loss(self, model: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
        self.threads.append(threading.current_thread().name)
        return (model(features)[:, 0] - labels).square().mean()

    def predict(self, model: nn.Module, features: Tensor) -> dict[str, Tensor]:
        self.threads.append(threading.current_thread().name)
        return {"value": model(features)[:, 0]}


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
@pytest.mark.parametrize("steps", [None, 4])
def test_q14_the_results_are_those_of_one_replica(tmp_path: Path, replicas: int, steps: int | None) -> None:
    one, several = Run(tmp_path), Run(tmp_path, strategy(replicas))
    one.estimator.train(batches)
    assert several.estimator.evaluate(batches, steps) == one.estimator.evaluate(batches, steps)
    assert several.metric.updates == one.metric.updates
    expected = [f"replica {index % replicas}" if replicas > 1 else "MainThread" for index in range(steps or 5)]
    assert several.threads == expected


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_q16_predictions_come_in_the_order_of_the_batches(tmp_path: Path, replicas: int) -> None:
    one, several = Run(tmp_path), Run(tmp_path, strategy(replicas))
    one.estimator.train(batches)
    expected = list(one.estimator.predict(batches))
    assert len(expected) == 20
    assert list(several.estimator.predict(batches)) == expected
    assert len(several.threads) == 5


def test_hooks_are_called_around_each_group(tmp_path: Path) -> None:
    losses: list[float] = []

    class Look(TrainingHook):
        def after_run(self, context: Any, values: Any) -> None:
            losses.append(values.loss)

    one, two = Run(tmp_path), Run(tmp_path, strategy(2))
    one.estimator.evaluate(batches, hooks=[Look()])
    each, losses = losses, []
    two.estimator.evaluate(batches, hooks=[Look()])
    assert losses == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2, each[4]])


def test_an_exception_of_a_replica_is_the_callers(tmp_path: Path) -> None:
    def broken(model: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
        raise LookupError("of a replica")

    def model_fn(mode: ModeKeys) -> EstimatorSpec:
        return EstimatorSpec(mode, model=net(), loss_fn=broken)

    estimator = Estimator(model_fn, str(tmp_path), RunConfig(eval_distribute=strategy(2)))
    with pytest.raises(LookupError, match="of a replica"):
        estimator.evaluate(batches)


def test_i01_the_input_learns_how_many_replicas_there_are(tmp_path: Path) -> None:
    seen: list[int] = []

    def data(input_context: ps.InputContext) -> list[tuple[Tensor, Tensor]]:
        seen.append(input_context.num_replicas_in_sync)
        return batches()

    run = Run(tmp_path, strategy(3))
    run.estimator.evaluate(data)
    list(run.estimator.predict(data))
    assert seen == [3, 3]


def test_q13_the_model_is_built_in_the_scope_of_the_evaluation(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def model_fn(mode: ModeKeys) -> EstimatorSpec:
        count = ps.get_strategy().num_replicas_in_sync
        seen.append((count, ps.Variable(torch.tensor(2.0), name="mine").read_value().item()))
        loss_fn = Run(tmp_path).loss
        return EstimatorSpec(mode, model=net(), loss_fn=loss_fn)

    estimator = Estimator(model_fn, str(tmp_path), RunConfig(eval_distribute=strategy(2)))
    for _ in range(2):
        estimator.evaluate(batches)
    assert seen == [(2, 2.0), (2, 2.0)]


def test_t20_the_configured_strategy_is_not_touched(tmp_path: Path) -> None:
    """Also where it is training at this moment: an evaluation between two steps changes nothing for it."""
    shared = strategy(2)
    run = Run(tmp_path / "shared", shared, train_distribute=shared, save_checkpoints_steps=1)
    spec = TrainSpec(lambda: batches(8), max_steps=4)
    eval_spec = EvalSpec(batches, steps=None, throttle_secs=0)
    results = train_and_evaluate(run.estimator, spec, eval_spec)
    assert results is not None
    assert shared.global_step == 4
    alone = Run(tmp_path / "alone", train_distribute=strategy(2))
    alone.estimator.train(lambda: batches(8))
    assert results[0] == alone.estimator.evaluate(batches)


def test_t21_an_evaluator_computes_on_its_strategys_devices_and_talks_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = {"chief": ["a.invalid:1"], "ps": ["b.invalid:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "evaluator", "index": 0}}))
    configured = ps.ParameterServerStrategy(compute_devices=["cpu:0", "cpu:1"])
    run = Run(tmp_path, configured)
    assert (str(run.estimator.config.task), run.estimator.config.master) == ("evaluator:0", "")
    run.estimator.evaluate(batches)
    assert set(run.threads) == {"replica 0", "replica 1"}
    assert configured.client is None


def test_what_is_no_strategy_of_ours_is_refused(tmp_path: Path) -> None:
    class Other:
        def scope(self) -> None:
            raise AssertionError

    with pytest.raises(ConfigError, match="eval_distribute: expected a CentralStorageStrategy or .*, got a Other"):
        Run(tmp_path, Other()).estimator.evaluate(batches)


def test_own_strategy_has_the_devices_and_nothing_else() -> None:
    assert own_strategy(None) is None
    own = own_strategy(ps.CentralStorageStrategy(["cpu:2", "cuda:1"]))
    assert own is not None
    assert own.extended.worker_devices == ("/device:CPU:2", "/device:GPU:1")


def test_replicas_show_what_they_are() -> None:
    assert repr(ModelReplicas(net())) == "<ModelReplicas: 1 on the device of the model>"
    assert repr(ModelReplicas(net(), own_strategy(strategy(2)))).startswith("<ModelReplicas: 2 on <CentralStorage")
