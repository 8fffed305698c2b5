"""One evaluation: the mean loss, the metrics, and the hooks around each batch (Q14, N12)."""

import numpy as np
import pytest
import torch
from torch import nn

from paramserver.errors import ConfigError
from paramserver.estimator import EstimatorSpec, ModeKeys, TrainingHook
from paramserver.estimator.evaluate.evaluation import EvaluationSession, evaluate

SESSION = EvaluationSession(global_step=7, task="evaluator:0", model_dir="run")
BATCHES = [(torch.tensor([[1.0]]), torch.tensor([0.0])), (torch.tensor([[3.0]]), torch.tensor([5.0]))]


class Twice(nn.Module):
    """Doubles; counts its calls, and knows whether it is evaluated."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, features):
        self.calls += 1
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return 2 * features


class Seen:
    """A metric that computes what it is told to, and keeps what it was given."""

    def __init__(self, value=0.5):
        self.value = value
        self.updates = ["of an earlier evaluation"]

    def update(self, predictions, labels):
        self.updates.append((predictions.tolist(), labels.tolist()))

    def compute(self):
        return self.value

    def reset(self):
        self.updates.clear()


def spec(**fields):
    model = Twice()
    defaults = {"loss_fn": lambda model, features, labels: model(features).sum() - labels.sum()}
    return EstimatorSpec(ModeKeys.EVAL, model=model, **(defaults | fields))


def run(of, batches=BATCHES, steps=None, hooks=()):
    return evaluate(of, iter(batches), steps, SESSION, hooks)


def test_the_loss_is_the_mean_over_the_batches():
    assert run(spec()) == {"loss": (2.0 + 1.0) / 2}


def test_steps_limits_the_batches():
    assert run(spec(), steps=1) == {"loss": 2.0}


def test_a_metric_gets_what_the_loss_computed_and_the_model_runs_once():
    metric = Seen()
    of = spec(eval_metrics={"seen": metric})
    assert run(of)["seen"] == 0.5
    assert metric.updates == [([[2.0]], [0.0]), ([[6.0]], [5.0])]
    assert of.model.calls == 2


def test_predict_fn_makes_the_predictions():
    metric = Seen()
    run(spec(eval_metrics={"seen": metric}, predict_fn=lambda model, features: -features))
    assert metric.updates == [([[-1.0]], [0.0]), ([[-3.0]], [5.0])]


def test_a_loss_that_does_not_call_the_model_once_leaves_it_to_the_metric():
    metric = Seen()
    of = spec(eval_metrics={"seen": metric}, loss_fn=lambda model, features, labels: labels.sum())
    run(of)
    assert metric.updates[0] == ([[2.0]], [0.0])
    assert of.model.calls == 2


def test_no_hook_stays_on_the_model():
    of = spec(eval_metrics={"seen": Seen()})
    run(of)
    assert not of.model._forward_hooks


def test_q11_empty_input_is_an_error():
    with pytest.raises(ConfigError, match="the input_fn gave no batch"):
        run(spec(), batches=[])


@pytest.mark.parametrize("value", [torch.tensor([0.25]), np.array([[0.25]]), torch.tensor(0.25, dtype=torch.bfloat16)])
def test_one_number_is_a_float_in_whatever_it_comes(value):
    result = run(spec(eval_metrics={"seen": Seen(value)}))["seen"]
    assert (result, type(result)) == (0.25, float)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([0.25, 0.75]), np.array([0.25, 0.75])),
        (torch.tensor([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])),
        (torch.tensor([0.25, 0.75], dtype=torch.bfloat16), np.array([0.25, 0.75])),
        (
            {"a": torch.tensor(0.5), "b": [1, (torch.tensor([1.0, 2.0]),)]},
            {"a": 0.5, "b": [1.0, (np.array([1.0, 2.0]),)]},
        ),
        ((0.5, True), (0.5, 1.0)),
    ],
)
def test_a_metric_may_compute_a_nest_of_numbers(value, expected):
    np.testing.assert_equal(run(spec(eval_metrics={"seen": Seen(value)}))["seen"], expected)


@pytest.mark.parametrize("value", [None, "high", {"a": "high"}, [1.0, None], np.array(["high", "low"])])
def test_a_metric_that_is_no_number_is_named(value):
    with pytest.raises(ConfigError, match="metric 'seen' must compute a single number, got"):
        run(spec(eval_metrics={"seen": Seen(value)}))


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="loss_fn must return a tensor of one element"):
        run(spec(loss_fn=lambda model, features, labels: torch.ones(2)))


class Recorder(TrainingHook):
    """Writes down what it sees, and stops after some batches."""

    def __init__(self, stop_after=99):
        self.log, self.left = [], stop_after

    def begin(self):
        self.log.append("begin")

    def after_create_session(self, session):
        self.log.append((session.global_step, session.task, session.model_dir, session.is_chief, session.should_stop()))

    def after_run(self, context, values):
        self.log.append((float(values.loss), values.global_step))
        self.left -= 1
        if not self.left:
            context.request_stop()

    def end(self, session):
        self.log.append("end")


def test_hooks_are_called_around_every_batch():
    hook = Recorder()
    run(spec(), hooks=[hook])
    assert hook.log == ["begin", (7, "evaluator:0", "run", False, False), (2.0, 7), (1.0, 7), "end"]


def test_a_hook_may_end_the_evaluation():
    assert run(spec(), hooks=[Recorder(stop_after=1)]) == {"loss": 2.0}


def test_an_evaluation_saves_nothing():
    with pytest.raises(ConfigError, match="only a training can write one"):
        SESSION.save()
