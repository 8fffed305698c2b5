"""Early stopping: when the chief decides it, and how the others learn it (Y01 to Y09)."""

import contextlib
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from paramserver import ClusterSpec, ParameterServerStrategy, SimpleClusterResolver
from paramserver.checkpoint.storage import join
from paramserver.distribute.central_storage import CentralStorageStrategy
from paramserver.errors import ConfigError
from paramserver.estimator import (
    Estimator,
    EstimatorSpec,
    EvalSpec,
    RunConfig,
    TrainSpec,
    make_early_stopping_hook,
    stop_if_higher_hook,
    stop_if_lower_hook,
    stop_if_no_decrease_hook,
    stop_if_no_increase_hook,
)
from paramserver.estimator import train_and_evaluate as run_locally
from paramserver.estimator.hooks.early_stopping import STOP
from paramserver.estimator.hooks.hook import HookRunner, RunValues
from paramserver.estimator.uploading import summary_writer
from paramserver.layout.variables import VariableSpec
from paramserver.summary import SummaryWriter

EVALUATIONS = {
    1000: {"loss": 0.8, "accuracy": 0.5},
    2000: {"loss": 0.7, "accuracy": 0.6},
    3000: {"loss": 0.4, "accuracy": 0.7},
    3500: {"loss": 0.41, "accuracy": 0.68},
}
OFTEN = {"run_every_secs": None, "run_every_steps": 1}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def model_fn(mode):
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    return EstimatorSpec(
        mode, model=model, loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip


def make(tmp_path, **config):
    options = {"save_checkpoints_steps": 2, "log_step_count_steps": None} | config
    return Estimator(model_fn, str(tmp_path / "run"), RunConfig(**options))


@pytest.fixture
def estimator(tmp_path):
    return make(tmp_path)


def write(folder, evaluations):
    writer = SummaryWriter(str(folder))
    for step, metrics in evaluations.items():
        for name, value in metrics.items():
            writer.scalar(name, value, step)
    writer.close()


def steps_until_stop(hook, steps=3, strategy=None):
    """Local steps until a hook stops the training, None if it does not; the global step is 10 times as high."""
    runner = HookRunner([hook])
    session = SimpleNamespace(task="worker:0")
    with strategy.scope() if strategy else contextlib.nullcontext():
        runner.begin()
        runner.after_create_session(session)
        for step in range(1, steps + 1):
            runner.step(lambda step=step: RunValues(0.0, 10 * step, 0))
            if runner.stop_requested:
                return step
    return None


def stops(hook):
    return steps_until_stop(hook, steps=1) is not None


# --- arguments


def test_y01_an_estimator_is_needed():
    with pytest.raises(TypeError, match="estimator: expected an Estimator, got 'run'"):
        make_early_stopping_hook("run", lambda: True)


def test_y01_a_predicate_is_a_function(estimator):
    with pytest.raises(TypeError, match="should_stop_fn: expected a function, got True"):
        make_early_stopping_hook(estimator, True)


@pytest.mark.parametrize("intervals", [{"run_every_steps": 10}, {"run_every_secs": 5, "run_every_steps": 10}])
def test_y01_both_intervals_are_refused(estimator, intervals):
    """Seconds are 60 by default."""
    with pytest.raises(ValueError, match=r"exactly one of run_every_secs and run_every_steps, got (60|5) and 10"):
        make_early_stopping_hook(estimator, lambda: True, **intervals)


@pytest.mark.parametrize("intervals", [{"run_every_secs": None}, {"run_every_secs": -1}])
def test_y01_an_interval_is_needed_and_positive(estimator, intervals):
    with pytest.raises(ValueError, match="expected (exactly one|a positive number)"):
        make_early_stopping_hook(estimator, lambda: True, **intervals)


# --- when the predicate is asked


class Predicate:
    """False so many times, then True."""

    def __init__(self, refusals=math.inf):
        self.refusals, self.calls = refusals, 0

    def __call__(self):
        self.calls += 1
        return self.calls > self.refusals


@pytest.mark.parametrize(
    ("intervals", "calls"),
    [
        ({"run_every_secs": None, "run_every_steps": 1}, 7),
        ({"run_every_secs": None, "run_every_steps": 20}, 4),
        ({"run_every_secs": 3600}, 1),
    ],
)
def test_y03_the_predicate_is_asked_at_the_first_step_and_then_at_most_every_interval(estimator, intervals, calls):
    predicate = Predicate()
    assert steps_until_stop(make_early_stopping_hook(estimator, predicate, **intervals), steps=7) is None
    assert predicate.calls == calls


def test_y02_the_chief_stops_when_the_predicate_says_so(estimator, caplog):
    caplog.set_level(logging.INFO)
    assert steps_until_stop(make_early_stopping_hook(estimator, Predicate(1), **OFTEN)) == 2
    assert "training is stopped early, at global step 20" in caplog.text


# --- a cluster


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The hook that a task of a cluster gets, and a strategy with the ps that it talks to."""

    def hook_of(role, predicate):
        cluster = {"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": role, "index": 0}}))
        hook = make_early_stopping_hook(make(tmp_path), predicate, **OFTEN)
        return hook, ParameterServerStrategy(SimpleClusterResolver(ClusterSpec({})))

    return hook_of


def stop_of(strategy, operation="add", value=0):
    """STOP, after another worker has changed it."""
    change = torch.tensor([value])
    return int(strategy.connect().variables.update(0, VariableSpec(STOP, (), "int64"), operation, change))


def test_y02_y05_the_chief_tells_the_others(task):
    hook, strategy = task("chief", Predicate(1))
    assert steps_until_stop(hook, steps=1, strategy=strategy) is None
    assert stop_of(strategy) == 0
    hook, strategy = task("chief", Predicate(1))
    assert steps_until_stop(hook, strategy=strategy) == 2
    assert stop_of(strategy) == 1


@pytest.mark.parametrize("amount", [1, 3])
def test_y02_y05_a_worker_asks_nobody_and_stops_after_the_step_that_finds_more_than_zero(task, amount):
    def never():
        raise AssertionError

    hook, strategy = task("worker", never)
    runner = HookRunner([hook])
    with strategy.scope():
        runner.begin()
        runner.after_create_session(SimpleNamespace(task="worker:0"))
        runner.step(lambda: RunValues(0.0, 1, 0))
        assert not runner.stop_requested
        assert stop_of(strategy, "add", amount) == amount
        runner.step(lambda: RunValues(0.0, 2, 0))
    assert runner.stop_requested


def test_y02_the_chief_says_it_again_when_a_ps_has_forgotten_it(task):
    """A session that is recreated may find what an older checkpoint had."""
    for refusals, steps in ((0, 1), (math.inf, None)):
        hook, strategy = task("chief", Predicate(refusals))
        assert steps_until_stop(hook, strategy=strategy) == steps
        decided = stop_of(strategy)
        stop_of(strategy, "assign", 1 - decided)
        with strategy.scope():
            hook.after_create_session(SimpleNamespace(task="chief:0"))
        assert stop_of(strategy) == decided == int(steps is not None)


@pytest.mark.parametrize("replicas", [1, 2])
def test_y04_any_strategy_will_do(tmp_path, replicas):
    """With seconds, too, which the original refuses as soon as there is a strategy."""
    strategy = CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])
    estimator = make(tmp_path, train_distribute=strategy)
    hook = make_early_stopping_hook(estimator, lambda: True)
    estimator.train(batches, hooks=[hook], max_steps=100)
    assert estimator.latest_checkpoint().endswith("ckpt-1")


def batches():
    while True:
        yield torch.ones(4, 3), torch.zeros(4)


def test_y02_v31_in_one_process_training_stops_is_evaluated_and_can_go_on(tmp_path, estimator):
    hook = stop_if_lower_hook(estimator, "loss", 1e9, **OFTEN)
    data = EvalSpec(lambda: [(torch.ones(4, 3), torch.zeros(4))], throttle_secs=0)
    metrics, _ = run_locally(estimator, TrainSpec(batches, max_steps=100, hooks=[hook]), data)
    assert metrics["global_step"] == 2  # where the first checkpoint is evaluated that has been trained
    estimator.train(batches, steps=4)
    assert estimator.latest_checkpoint().endswith("ckpt-6")


# --- the rules on metrics


@pytest.fixture
def evaluated(estimator, tmp_path):
    write(tmp_path / "run" / "eval", EVALUATIONS)
    return estimator


@pytest.mark.parametrize(
    ("make_hook", "metric", "threshold", "min_steps", "expected"),
    [
        (stop_if_higher_hook, "accuracy", 0.6, 0, True),
        (stop_if_higher_hook, "accuracy", 0.69, 0, True),  # in the past, not in the last evaluation
        (stop_if_higher_hook, "accuracy", 0.8, 0, False),
        (stop_if_higher_hook, "accuracy", 0.6, 4000, False),
        (stop_if_higher_hook, "accuracy", 0.69, 3001, False),
        (stop_if_lower_hook, "loss", 0.5, 0, True),
        (stop_if_lower_hook, "loss", 0.405, 3000, True),
        (stop_if_lower_hook, "loss", 0.3, 0, False),
        (stop_if_lower_hook, "loss", 0.5, 4000, False),
        (stop_if_higher_hook, "error", 0.5, 4000, False),  # nothing is asked of it yet
    ],
)
def test_y06_a_threshold(evaluated, make_hook, metric, threshold, min_steps, expected):
    assert stops(make_hook(evaluated, metric, threshold, min_steps=min_steps, **OFTEN)) is expected


@pytest.mark.parametrize("make_hook", [stop_if_higher_hook, stop_if_lower_hook])
def test_y06_equal_is_not_beyond(estimator, tmp_path, make_hook):
    write(tmp_path / "run" / "eval", {10: {"loss": 0.6}})
    assert not stops(make_hook(estimator, "loss", 0.6, **OFTEN))


@pytest.mark.parametrize(
    ("make_hook", "metric"), [(stop_if_no_increase_hook, "accuracy"), (stop_if_no_decrease_hook, "loss")]
)
@pytest.mark.parametrize(
    ("max_steps", "min_steps", "expected"), [(500, 0, True), (501, 0, False), (1500, 0, False), (500, 3001, False)]
)
def test_y07_no_improvement(evaluated, make_hook, metric, max_steps, min_steps, expected):
    assert stops(make_hook(evaluated, metric, max_steps, min_steps=min_steps, **OFTEN)) is expected


def test_y07_the_same_value_again_is_no_improvement(estimator, tmp_path):
    write(tmp_path / "run" / "eval", {step: {"loss": 0.5} for step in (10, 20, 30)})
    assert stops(stop_if_no_decrease_hook(estimator, "loss", 20, **OFTEN))


def test_y08_without_evaluations_training_goes_on(estimator):
    assert not stops(stop_if_higher_hook(estimator, "loss", -1.0, **OFTEN))
    assert not stops(stop_if_no_increase_hook(estimator, "loss", 1, **OFTEN))


def test_y08_eval_dir_may_be_another(estimator, tmp_path):
    write(tmp_path / "run" / "eval_test", EVALUATIONS)
    assert stops(stop_if_lower_hook(estimator, "loss", 0.5, eval_dir=tmp_path / "run" / "eval_test", **OFTEN))
    assert not stops(stop_if_lower_hook(estimator, "loss", 0.5, **OFTEN))


def test_y08_evaluations_are_read_anew(estimator, tmp_path):
    hook = stop_if_lower_hook(estimator, "loss", 0.5, **OFTEN)
    assert not stops(hook)
    write(tmp_path / "run" / "eval", EVALUATIONS)
    hook = stop_if_lower_hook(estimator, "loss", 0.5, **OFTEN)
    assert stops(hook)


@pytest.mark.parametrize("make_hook", [stop_if_higher_hook, stop_if_no_increase_hook])
def test_y09_a_metric_that_is_missing_is_named(evaluated, tmp_path, make_hook):
    folder = tmp_path / "run" / "eval"
    with pytest.raises(ConfigError) as raised:
        stops(make_hook(evaluated, "accuracies", 9, **OFTEN))
    assert str(raised.value) == (
        f"early stopping: the evaluation of step 1000 in {folder} has no metric 'accuracies', only accuracy, loss; "
        "did you mean 'accuracy'?"
    )


def test_y09_the_newest_evaluation_may_be_incomplete(estimator, tmp_path):
    """Another process is writing it; the next look finds all of it."""
    write(tmp_path / "run" / "eval", {10: {"loss": 0.5, "accuracy": 0.5}, 20: {"loss": 0.4}})
    assert not stops(stop_if_higher_hook(estimator, "accuracy", 0.6, **OFTEN))


def test_the_reason_is_logged(evaluated, caplog):
    caplog.set_level(logging.INFO)
    stops(stop_if_higher_hook(evaluated, "accuracy", 0.6, **OFTEN))
    stops(stop_if_no_decrease_hook(evaluated, "loss", 500, **OFTEN))
    assert "accuracy was 0.7 at step 3000, beyond the threshold 0.6" in caplog.text
    assert "loss was best at step 3000 with 0.4, and not better until step 3500" in caplog.text


@pytest.mark.parametrize("eval_dir", [None, "other"])
@pytest.mark.parametrize("url", ["file://{}", "memory://{}"])
def test_y06_evaluations_may_lie_at_a_url(tmp_path, url, eval_dir):
    place = url.format(tmp_path / "run")
    estimator, folder = Estimator(model_fn, place), join(place, eval_dir or "eval")
    assert steps_until_stop(stop_if_higher_hook(estimator, "accuracy", 0.6, eval_dir and folder, **OFTEN)) is None
    with summary_writer(folder) as writer:
        writer.scalar("accuracy", 0.7, 3000)
    assert steps_until_stop(stop_if_higher_hook(estimator, "accuracy", 0.6, eval_dir and folder, **OFTEN)) == 1
