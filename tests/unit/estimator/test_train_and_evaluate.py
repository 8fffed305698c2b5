"""Which part of a run each task plays (T08 to T13, T22 to T27, Q21, G15, V30). Nobody connects."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramserver as ps
from paramserver.cluster import Role
from paramserver.errors import ConfigError
from paramserver.estimator import (
    CheckpointSaverListener,
    Estimator,
    EstimatorSpec,
    EvalSpec,
    ModeKeys,
    RunConfig,
    TrainingHook,
    TrainSpec,
    train_and_evaluate,
)
from paramserver.estimator.hooks.hook import order_hooks
from paramserver.layout.variables import VariableSpec

MODULE = sys.modules["paramserver.estimator.train_and_evaluate"]  # the name in the package is the function's
CLUSTER = {"chief": ["a.invalid:1"], "worker": ["b.invalid:1", "c.invalid:1"], "ps": ["d.invalid:1", "e.invalid:1"]}


@pytest.fixture
def tf_config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_to(role: str, index: int = 0, cluster: dict[str, list[str]] = CLUSTER) -> None:
        task = {"type": role, "index": index}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))

    return set_to


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the task does, in order; none of it is done."""
    done: list[Any] = []

    def train_on(estimator: Estimator, strategy: Any, input_fn: Any, **arguments: Any) -> None:
        done.append(("train", strategy, arguments))

    monkeypatch.setattr(Estimator, "train_on", train_on)
    monkeypatch.setattr(MODULE, "wait_for", lambda seconds: done.append(("wait", seconds)))
    monkeypatch.setattr(MODULE, "run_standard_server", lambda: done.append(("serve",)))
    return done


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


def run(model_dir: Path, train_spec: TrainSpec | None = None, **config: Any) -> Any:
    estimator = Estimator(model_fn, str(model_dir), RunConfig(**config))
    return train_and_evaluate(estimator, train_spec or TrainSpec(batches), EvalSpec(batches, throttle_secs=0))


def test_t08_the_start_delay_comes_before_the_training(
    tmp_path: Path, tf_config: Callable[..., None], log: list[Any]
) -> None:
    """Nobody connects to a worker (F02), so there is no server that others could miss meanwhile."""
    tf_config("worker", 1)
    run(tmp_path, max_worker_delay_secs=None)
    assert [entry[0] for entry in log] == ["wait", "train"]
    assert log[0] == ("wait", 10)


@pytest.mark.parametrize("role", ["chief", "worker"])
def test_q21_without_a_strategy_variables_go_round_the_ps_tasks(
    tmp_path: Path, tf_config: Callable[..., None], log: list[Any], role: str
) -> None:
    tf_config(role)
    assert run(tmp_path) is None
    ((_, strategy, _),) = log
    assert isinstance(strategy, ps.ParameterServerStrategy)
    assert str(strategy.task) == f"{role}:0"
    variable = VariableSpec("v", (1,), "float32")
    assert [strategy.place(variable) for _ in range(4)] == [0, 1, 0, 1]


def test_t13_a_ps_serves_and_does_nothing_else(tmp_path: Path, tf_config: Callable[..., None], log: list[Any]) -> None:
    tf_config("ps", 1)
    assert run(tmp_path) is None
    assert log == [("serve",)]


def test_t22_t23_hooks_and_listeners_of_the_spec_reach_the_training(
    tmp_path: Path, tf_config: Callable[..., None], log: list[Any]
) -> None:
    hook, listener = TrainingHook(), CheckpointSaverListener()
    spec = TrainSpec(batches, max_steps=7, hooks=[hook], saving_listeners=[listener])
    for role in ("chief", "worker"):
        tf_config(role)
        run(tmp_path, spec)
    for _, _, arguments in log:
        assert arguments == {"hooks": (hook,), "saving_listeners": (listener,), "max_steps": 7}


def test_t12_what_saves_belongs_to_the_chief_and_hooks_to_all() -> None:
    saver, user = TrainingHook(), TrainingHook()
    assert order_hooks(is_chief=True, chief_only=[saver], user=[user]) == (saver, user)
    assert order_hooks(is_chief=False, chief_only=[saver], user=[user]) == (user,)


@pytest.mark.parametrize("strategy", [None, ps.CentralStorageStrategy(["cpu:0", "cpu:1"])])
def test_t10_a_task_that_is_alone_in_its_cluster_trains_in_its_process(
    tmp_path: Path, tf_config: Callable[..., None], caplog: pytest.LogCaptureFixture, strategy: Any
) -> None:
    caplog.set_level(logging.INFO)
    tf_config("chief", cluster={"chief": ["a.invalid:1"], "evaluator": ["b.invalid:1"]})
    assert run(tmp_path, train_distribute=strategy, log_step_count_steps=None) is None
    assert "chief:0 is alone in its cluster: the variables stay in its process" in caplog.text
    assert (tmp_path / ("ckpt-1" if strategy else "ckpt-3")).is_dir()


def test_t10_a_cluster_that_cannot_train_is_refused(tmp_path: Path, tf_config: Callable[..., None]) -> None:
    tf_config("chief", cluster={"chief": ["a.invalid:1"], "worker": ["b.invalid:1"]})
    with pytest.raises(ValueError, match="ps"):
        run(tmp_path)


def test_t20_a_strategy_of_another_cluster_is_refused(tmp_path: Path, tf_config: Callable[..., None]) -> None:
    tf_config("chief")
    with pytest.raises(ConfigError, match="expected a ParameterServerStrategy that was made with this cluster"):
        run(tmp_path, train_distribute=ps.CentralStorageStrategy(["cpu:0"]))


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("wroker", "expected one of 'chief', 'worker', 'ps', 'evaluator'.* got 'wroker'; did you mean 'worker'"),
        ("local", "got 'local'"),
        ("", "task_type"),
    ],
)
def test_t06_t26_a_role_that_there_is_not_is_refused(
    tmp_path: Path, tf_config: Callable[..., None], role: str, message: str
) -> None:
    tf_config(role)
    with pytest.raises(ValueError, match=message):
        run(tmp_path)


@pytest.mark.parametrize(("role", "index", "is_chief"), [("chief", 0, True), ("worker", 1, False)])
def test_t27_what_a_task_knows_of_its_part(
    tf_config: Callable[..., None], role: str, index: int, is_chief: bool
) -> None:
    tf_config(role, index)
    config, extended = RunConfig(), ps.ParameterServerStrategy().extended
    assert config.master.startswith("grpc://")
    assert config.num_worker_replicas == 3
    assert (extended.should_init, extended.should_checkpoint, extended.should_save_summary) == (is_chief,) * 3


def test_t27_who_is_alone_has_no_master(tf_config: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tf_config("evaluator")
    assert RunConfig().master == ""
    monkeypatch.delenv("TF_CONFIG")
    assert (RunConfig().master, RunConfig().num_worker_replicas) == ("", 1)


# --- what stands in the place of lines that have no counterpart (docs/decisions/0011)


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
