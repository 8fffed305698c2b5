"""What stands in the place of lines of the Estimator's contract that have no counterpart (docs/decisions/0011)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramserver as ps
from paramserver.cluster import Role
from paramserver.estimator import Estimator, EstimatorSpec, EvalSpec, ModeKeys, RunConfig, TrainSpec, train_and_evaluate

MODULE = sys.modules["paramserver.estimator.train_and_evaluate"]  # the name in the package is the function's
JOBS = {"worker": ["b.invalid:1"], "ps": ["d.invalid:1"]}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a task does, in order; none of it is done."""
    log: list[str] = []
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setattr(Estimator, "train_on", lambda *_, **__: log.append("train"))
    monkeypatch.setattr(Estimator, "evaluate", lambda *_, **__: log.append("evaluate"))
    monkeypatch.setattr(MODULE, "run_standard_server", lambda: log.append("serve"))
    monkeypatch.setattr(MODULE, "_run_evaluator", lambda *_: log.append("follow"))
    return log


def model_fn(mode: ModeKeys) -> EstimatorSpec:
    model = nn.Linear(2, 1)
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: (model(features)[:, 0] - labels).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.ones(2, 2), torch.ones(2))] * 3


def play(monkeypatch: pytest.MonkeyPatch, model_dir: Path, role: str, **more: Any) -> RunConfig:
    """One task of a cluster plays its part."""
    cluster = {("master" if role == "master" else "chief"): ["a.invalid:1"], **JOBS}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": role, "index": 0}, **more}))
    config = RunConfig(model_dir=str(model_dir))
    assert train_and_evaluate(Estimator(model_fn, config=config), TrainSpec(batches), EvalSpec(batches)) is None
    return config


def test_g15_the_one_strategy_there_is_trains_and_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert [name for name in ps.__all__ if "ParameterServer" in name] == ["ParameterServerStrategy"]
    strategy = ps.ParameterServerStrategy()
    config = RunConfig(train_distribute=strategy, eval_distribute=strategy)
    assert (config.train_distribute, config.eval_distribute) == (strategy, strategy)


@pytest.mark.parametrize(("role", "part"), [("ps", "serve"), ("chief", "train"), ("worker", "train")])
@pytest.mark.parametrize("environment", [{}, {"environment": "google"}, {"environment": "cloud"}])
def test_t11_an_environment_changes_nothing_of_what_a_task_does(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch, role: str, part: str, environment: dict[str, str]
) -> None:
    """In none of them a task that trains starts a server, and in each of them a ps serves."""
    play(monkeypatch, tmp_path, role, **environment)
    assert done == [part]


@pytest.mark.filterwarnings("ignore:the job name 'master'")
def test_v30_a_master_is_a_chief_which_trains_and_leaves_evaluation_to_an_evaluator(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = play(monkeypatch, tmp_path, "master")
    assert (config.task_type, config.is_chief) == (Role.CHIEF, True)
    assert not play(monkeypatch, tmp_path, "worker").is_chief  # summaries and counting do not move to worker:0
    play(monkeypatch, tmp_path, "evaluator")
    assert done == ["train", "train", "follow"]


def test_v30_without_a_cluster_one_process_trains_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    estimator = Estimator(model_fn, str(tmp_path), RunConfig(log_step_count_steps=None))
    results = train_and_evaluate(estimator, TrainSpec(batches, max_steps=2), EvalSpec(batches))
    assert results is not None
    assert results[0]["global_step"] == 2
