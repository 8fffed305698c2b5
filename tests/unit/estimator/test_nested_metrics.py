"""Metrics that compute several numbers, from the evaluation to summaries, exporters and early stopping."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassRecall

from paramserver.errors import ConfigError
from paramserver.estimator import (
    BestExporter,
    Estimator,
    EstimatorSpec,
    EvalSpec,
    RunConfig,
    TrainSpec,
    read_eval_metrics,
    stop_if_higher_hook,
    train_and_evaluate,
)
from paramserver.estimator.evaluate.results import scalars

# Of three examples of class 0 one is predicted as class 1; the one of class 1 is right.
LOGITS = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
LABELS = torch.tensor([0, 0, 0, 1])


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


class Adds(nn.Module):
    """The logits as they come, and something to train."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, features):
        return features + self.nothing


def metrics():
    return {
        "of_class": MulticlassAccuracy(2, average=None),
        "all": MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro"), "recall": MulticlassRecall(2)}),
        "confusion": MulticlassConfusionMatrix(2),
    }


def model_fn(mode):
    model = Adds()
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: nn.functional.cross_entropy(model(features), labels),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        eval_metrics=metrics(),
    )


def data():
    return [(LOGITS, LABELS)] * 5


def make(folder, **config):
    return Estimator(model_fn, str(folder), RunConfig(log_step_count_steps=None, **config))


EXPECTED = {
    "of_class": np.array([2 / 3, 1]),
    "all": {"accuracy": 0.75, "recall": 5 / 6},
    "confusion": np.array([[10, 5], [0, 5]]),
}
WRITTEN = {
    "of_class/0": 2 / 3,
    "of_class/1": 1,
    "all/accuracy": 0.75,
    "all/recall": 5 / 6,
    **{f"confusion/{row}/{column}": EXPECTED["confusion"][row, column] for row in (0, 1) for column in (0, 1)},
}


def test_an_evaluation_returns_the_nest_and_writes_its_numbers(tmp_path, caplog):
    caplog.set_level("INFO")
    estimator = make(tmp_path)
    results = estimator.evaluate(data)
    for name, value in EXPECTED.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-6) if name != "all" else None
    assert results["all"] == pytest.approx(EXPECTED["all"])
    assert {type(value) for value in scalars(results).values()} == {float, int}, "as a launcher is told them"
    (written,) = read_eval_metrics(tmp_path / "eval").values()
    assert {name: value for name, value in written.items() if name != "loss"} == pytest.approx(WRITTEN)
    assert "of_class = [0.666667, 1], all = [0.75, 0.833333], confusion = [10, 5, 0, 5], loss = " in caplog.text


def test_a_run_exports_the_best_and_stops_by_one_of_the_numbers(tmp_path):
    def better(best_eval_result, current_eval_result):
        return current_eval_result["all"]["recall"] > best_eval_result["all"]["recall"]

    estimator = make(tmp_path, save_checkpoints_steps=1)
    stop = stop_if_higher_hook(estimator, "of_class/0", 0.5, run_every_secs=None, run_every_steps=1)
    results, exports = train_and_evaluate(
        estimator,
        TrainSpec(data, max_steps=5, hooks=[stop]),
        EvalSpec(data, steps=None, throttle_secs=0, exporters=BestExporter("best", compare_fn=better)),
    )
    assert results["global_step"] < 5
    assert results["of_class"][0] == pytest.approx(2 / 3)
    assert len(exports) == 1
    assert len(list((tmp_path / "export" / "best").iterdir())) == 1


def test_a_number_that_is_not_there_is_told_with_those_that_are(tmp_path):
    estimator = make(tmp_path, save_checkpoints_steps=1)
    stop = stop_if_higher_hook(estimator, "of_class", 0.5, run_every_secs=None, run_every_steps=1)
    with pytest.raises(ConfigError, match="has no metric 'of_class', only all/accuracy, .* did you mean 'of_class/"):
        train_and_evaluate(
            estimator, TrainSpec(data, max_steps=5, hooks=[stop]), EvalSpec(data, steps=None, throttle_secs=0)
        )


class Many:
    """Computes more numbers than anybody looks at."""

    def update(self, predictions, labels):
        pass

    def compute(self):
        return torch.arange(2000.0)

    def reset(self):
        pass


def test_a_metric_of_too_many_numbers_is_returned_and_not_written_which_is_said(tmp_path, caplog):
    def many_fn(mode):
        spec = model_fn(mode)
        return EstimatorSpec(mode, model=spec.model, loss_fn=spec.loss_fn, eval_metrics={"many": Many()})

    results = Estimator(many_fn, str(tmp_path)).evaluate(data)
    assert results["many"].shape == (2000,)
    assert list(next(iter(read_eval_metrics(tmp_path / "eval").values()))) == ["loss"]
    assert "no summary is written of many: too many numbers" in caplog.text
