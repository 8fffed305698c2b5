"""Evaluations of a model while it is trained in the same process."""

import json

import pytest
import torch
from torch import nn

from paramserver import CentralStorageStrategy
from paramserver.errors import ConfigError
from paramserver.estimator import (
    Estimator,
    EstimatorSpec,
    InMemoryEvaluatorHook,
    RunConfig,
    TrainingHook,
    read_eval_metrics,
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def model_fn(mode):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    )


def data():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(40, 3, generator=generator)
    return list(zip(features.split(4), features.sum(1).split(4), strict=True))


def make(folder, **config):
    return Estimator(model_fn, str(folder), RunConfig(seed=1, log_step_count_steps=None, **config))


def evaluated(estimator, folder="eval"):
    return read_eval_metrics(f"{estimator.model_dir}/{folder}")


@pytest.mark.parametrize(("every", "steps"), [(4, [0, 4, 8, 10]), (5, [0, 5, 10]), (100, [0, 10])])
def test_it_evaluates_at_the_start_when_due_and_at_the_end(tmp_path, every, steps):
    estimator = make(tmp_path, save_checkpoints_steps=None, save_checkpoints_secs=None)
    estimator.train(data, hooks=[InMemoryEvaluatorHook(estimator, data, every_n_iter=every)])
    assert list(evaluated(estimator)) == steps
    assert estimator.latest_checkpoint() is None


@pytest.mark.parametrize("replicas", [1, 2])
def test_its_results_are_those_of_the_checkpoint_of_the_same_step_and_it_changes_no_training(tmp_path, replicas):
    def strategy():
        return CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])

    plain = make(tmp_path / "plain", train_distribute=strategy()).train(data)
    estimator = make(tmp_path / "own", train_distribute=strategy())
    hook = InMemoryEvaluatorHook(estimator, data, steps=3, name="memory", every_n_iter=2)
    estimator.train(data, hooks=[hook])
    theirs, ours = (Estimator(model_fn, each.model_dir) for each in (plain, estimator))
    expected = theirs.evaluate(data, steps=3)
    assert ours.evaluate(data, steps=3) == expected
    last = evaluated(estimator, "eval_memory")[expected["global_step"]]
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_its_hooks_are_called_around_every_batch(tmp_path):
    class Count(TrainingHook):
        batches = 0

        def after_run(self, context, values):
            self.batches += 1

    count, estimator = Count(), make(tmp_path)
    estimator.train(data, steps=4, hooks=[InMemoryEvaluatorHook(estimator, data, 2, [count], every_n_iter=2)])
    assert count.batches == 2 * 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"estimator": None}, TypeError, "estimator: expected an Estimator, got None"),
        ({"input_fn": [1]}, TypeError, r"input_fn: expected a function, got \[1\]"),
        ({"every_n_iter": 0}, ConfigError, "every_n_iter: expected a positive number, got 0"),
        ({"every_n_iter": None}, ConfigError, "every_n_iter: expected a positive number, got None"),
        ({"every_n_iter": True}, ConfigError, "every_n_iter: expected a positive number, got True"),
        ({"steps": 0}, ConfigError, "steps: expected a positive number, got 0"),
        ({"steps": True}, ConfigError, "steps: expected a positive number, got True"),
        ({"hooks": [1]}, TypeError, r"hooks\[0\]: expected an instance of TrainingHook, got 1"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=f"InMemoryEvaluatorHook: {message}"):
        InMemoryEvaluatorHook(**({"estimator": make(tmp_path), "input_fn": data} | changes))


def test_in_a_cluster_there_is_an_evaluator_for_it(tmp_path, monkeypatch):
    cluster = {"chief": ["a:1"], "ps": ["b:1"], "worker": ["c:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "chief", "index": 0}}))
    with pytest.raises(ConfigError, match="chief:0 is a task of a cluster, .* add an evaluator to the cluster"):
        InMemoryEvaluatorHook(make(tmp_path), data)
