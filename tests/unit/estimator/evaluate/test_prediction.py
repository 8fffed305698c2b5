"""Predictions (Q16, Q17, Q20): rows and batches, keys, hooks, and what a generator leaves alone."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paramserver as ps
from paramserver.errors import CheckpointError, ConfigError
from paramserver.estimator import Estimator, EstimatorSpec, ModeKeys, RunConfig, TrainingHook, WarmStartSettings
from paramserver.estimator.calling import features_of
from paramserver.estimator.evaluate.prediction import rows


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)


def squared_error(model: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    return (model(features)[:, 0] - labels).square().mean()


def linear(mode: ModeKeys) -> EstimatorSpec:
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return EstimatorSpec(mode, model=model, loss_fn=squared_error, optimizer=optimizer)


def predicting(predict_fn: Callable[[nn.Module, Any], Any]) -> Callable[[ModeKeys], EstimatorSpec]:
    def model_fn(mode: ModeKeys) -> EstimatorSpec:
        return EstimatorSpec(mode, model=nn.Identity(), predict_fn=predict_fn)

    return model_fn


def both(model: nn.Module, features: Tensor) -> dict[str, Tensor]:
    return {"sum": features.sum(1), "class": features.argmax(1)}


def data() -> list[tuple[Tensor, Tensor]]:
    """Seven examples in three batches, the last one short."""
    features = torch.rand(7, 3, generator=torch.Generator().manual_seed(1))
    return [(part, part.sum(1)) for part in features.split(3)]


def features() -> list[Tensor]:
    return [part for part, _ in data()]


def make(tmp_path: Path, fn: Callable[..., EstimatorSpec] = linear, **config: Any) -> Estimator:
    options = {"save_checkpoints_steps": 100, "log_step_count_steps": None} | config
    return Estimator(fn, str(tmp_path / "run"), RunConfig(**options))


@pytest.fixture
def trained(tmp_path: Path) -> Estimator:
    return make(tmp_path).train(data)


def plain(estimator: Estimator) -> nn.Module:
    """The model of the latest checkpoint, as PyTorch loads it."""
    model = nn.Linear(3, 1)
    checkpoint = estimator.latest_checkpoint()
    assert checkpoint is not None
    (file,) = Path(checkpoint).glob("model*.safetensors")
    model.load_state_dict(load_file(file))
    return model


# --- what comes out


def test_q16_each_example_has_a_row(trained: Estimator) -> None:
    with torch.no_grad():
        expected = plain(trained)(torch.cat(features()))
    torch.testing.assert_close(torch.stack(list(trained.predict(data))), expected)


def test_q16_or_each_batch_has_its_predictions(trained: Estimator) -> None:
    whole = list(trained.predict(data, yield_single_examples=False))
    assert [part.shape for part in whole] == [(3, 1), (3, 1), (1, 1)]
    assert torch.equal(torch.cat(whole), torch.stack(list(trained.predict(data))))


def test_q16_a_dict_comes_out_as_dicts_of_rows(tmp_path: Path) -> None:
    made = list(make(tmp_path, predicting(both)).predict(features))
    assert len(made) == 7
    assert [row["class"].item() for row in made] == torch.cat(features()).argmax(1).tolist()
    assert all(row.keys() == {"sum", "class"} for row in made)


def test_q16_predict_keys_choose(tmp_path: Path) -> None:
    estimator = make(tmp_path, predicting(both))
    for keys in ("class", ["class"], ("class", "unknown")):
        assert {tuple(row) for row in estimator.predict(features, predict_keys=keys)} == {("class",)}
    (first, *_) = estimator.predict(features, ["sum", "class"], yield_single_examples=False)
    assert list(first) == ["sum", "class"]


@pytest.mark.parametrize(
    ("predict_fn", "keys", "message"),
    [
        (both, ["logits"], r"expected some of \['class', 'sum'\], got \['logits'\]"),
        (lambda model, x: x, ["logits"], "choose from a dict of predictions, and these are a Tensor"),
        (both, [], "expected names of predictions, got"),
        (both, [1], "expected names of predictions, got"),
        (both, 1, "expected names of predictions, got 1"),
    ],
)
def test_q16_keys_that_choose_nothing_are_refused(tmp_path: Path, predict_fn: Any, keys: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(make(tmp_path, predicting(predict_fn)).predict(features, predict_keys=keys))


def test_q16_predictions_of_different_lengths_are_refused(tmp_path: Path) -> None:
    def uneven(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"all": x, "first": x[:1]}

    estimator = make(tmp_path, predicting(uneven))
    message = r"one number of rows, got 3 of predictions\['all'\], 1 of predictions\['first'\]"
    with pytest.raises(ValueError, match=message):
        next(estimator.predict(features))
    assert len(list(estimator.predict(features, yield_single_examples=False))) == 3


def test_q16_a_prediction_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"predictions\[0\] has no rows: .* got a Tensor of shape \[\]"):
        next(rows([torch.tensor(1.0)]))
    with pytest.raises(ConfigError, match="predictions has no rows: .* got a str"):
        next(rows("text"))
    with pytest.raises(ConfigError, match="got none"):
        next(rows({"nothing": None}))


class Pair(NamedTuple):
    """A named tuple."""

    left: Any
    right: Any


def test_rows_of_a_nest_keep_its_structure() -> None:
    nest = {"a": Pair(torch.tensor([1, 2]), ["x", "y"]), "b": [np.array([3, 4]), None]}
    first, second = rows(nest)
    assert first == {"a": Pair(1, "x"), "b": [3, None]}
    assert second == {"a": Pair(2, "y"), "b": [4, None]}


# --- what goes in


@pytest.mark.parametrize(
    "batches",
    [
        lambda: [part for part, _ in data()],
        lambda: data(),
        lambda: [[part] for part, _ in data()],
        lambda: iter(data()),
        lambda: DataLoader(TensorDataset(torch.cat(features())), batch_size=2),
        lambda: DataLoader(TensorDataset(torch.cat(features()), torch.zeros(7)), batch_size=3),
        lambda: DataLoader(torch.cat(features()), batch_size=3),  # type: ignore[arg-type]  # a tensor is indexed
    ],
    ids=["features", "pairs", "singles", "iterator", "loader of one", "loader of pairs", "loader of features"],
)
def test_q16_labels_are_ignored(tmp_path: Path, batches: Callable[[], Any]) -> None:
    estimator = make(tmp_path, predicting(lambda model, x: x))
    assert torch.equal(torch.stack(list(estimator.predict(batches))), torch.cat(features()))


def test_features_may_be_a_dict_and_no_tuple_of_three() -> None:
    assert list(features_of([{"x": 1}], "input_fn")) == [{"x": 1}]
    with pytest.raises(ConfigError, match="predict_input: expected batches of features, .* got a tuple of length 3"):
        list(features_of([(1, 2, 3)], "predict_input"))


def test_an_input_without_batches_gives_no_predictions(tmp_path: Path) -> None:
    assert list(make(tmp_path).predict(list)) == []


def test_q02_the_functions_are_told_the_mode(tmp_path: Path) -> None:
    modes: list[ModeKeys] = []

    def build(mode: ModeKeys) -> EstimatorSpec:
        modes.append(mode)
        return linear(mode)

    def given(mode: ModeKeys, input_context: ps.InputContext) -> list[Tensor]:
        modes.append(mode)
        assert input_context.num_input_pipelines == 1
        return features()

    list(make(tmp_path, build).predict(given))
    assert modes == [ModeKeys.PREDICT, ModeKeys.PREDICT]


def test_q20_predict_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing model: mode PREDICT needs model"):
        list(make(tmp_path, lambda mode: EstimatorSpec(mode)).predict(features))


# --- which model


def test_q16_the_model_is_the_latest_checkpoints_or_the_one_that_is_named(trained: Estimator) -> None:
    latest = torch.stack(list(trained.predict(data)))
    first = torch.stack(list(trained.predict(data, checkpoint_path=str(Path(trained.model_dir, "ckpt-0")))))
    assert not torch.equal(latest, first)


def test_q16_without_a_checkpoint_the_fresh_model_predicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = torch.stack(list(make(tmp_path).predict(data)))
    assert "predicting with the model as it is built" in caplog.text
    model = linear(ModeKeys.PREDICT).model
    assert model is not None
    with torch.no_grad():
        torch.testing.assert_close(made, model(torch.cat(features())))
    assert not (tmp_path / "run").exists()


def test_q16_q18_or_the_warm_started_one(tmp_path: Path, trained: Estimator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    other = Estimator(linear, str(tmp_path / "other"), warm_start_from=WarmStartSettings(trained.model_dir))
    assert torch.equal(torch.stack(list(other.predict(data))), torch.stack(list(trained.predict(data))))
    assert "predicting with the model as it is warm-started" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, trained: Estimator) -> None:
    other = make(tmp_path, lambda mode: EstimatorSpec(mode, model=nn.Linear(4, 1)))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        list(other.predict(data))


# --- what it leaves alone


class Watchful(nn.Module):
    """Refuses to be anything but evaluated."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return x + torch.rand(())


def test_q16_the_model_is_in_inference_mode_and_the_caller_is_not(tmp_path: Path) -> None:
    estimator = make(tmp_path, lambda mode: EstimatorSpec(mode, model=Watchful()))
    for _ in estimator.predict(features, yield_single_examples=False):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_q16_q22_the_callers_random_numbers_and_the_models_do_not_mix(tmp_path: Path) -> None:
    estimator = make(tmp_path, lambda mode: EstimatorSpec(mode, model=Watchful()), seed=5)
    undisturbed = list(estimator.predict(features))
    torch.manual_seed(1)
    expected = [torch.rand(()).item() for _ in range(7)]
    torch.manual_seed(1)
    made, mine = [], []
    for row in estimator.predict(features):
        made.append(row)
        mine.append(torch.rand(()).item())
    assert mine == expected
    assert all(map(torch.equal, made, undisturbed))


def test_the_callers_scope_is_not_the_predictions(tmp_path: Path) -> None:
    seen: list[bool] = []

    def look(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(ps.has_strategy())
        return x

    with ps.CentralStorageStrategy(["cpu:0"]).scope():
        for _ in make(tmp_path, predicting(look)).predict(features):
            assert ps.has_strategy()
    assert seen == [False] * 3


def test_nothing_happens_before_the_first_prediction_is_asked_for(tmp_path: Path) -> None:
    def never(mode: ModeKeys) -> EstimatorSpec:
        raise AssertionError

    make(tmp_path, never).predict(features)
    with pytest.raises(TypeError, match=r"predict: hooks\[0\]"):
        make(tmp_path, never).predict(features, hooks=["hook"])  # type: ignore[list-item]  # what the test is about


def test_batches_are_read_when_they_are_needed_and_the_input_is_closed(tmp_path: Path) -> None:
    log: list[str] = []

    def given() -> Iterator[Tensor]:
        try:
            for index in range(3):
                log.append(f"read {index}")
                yield torch.zeros(2, 1)
        finally:
            log.append("closed")

    made = make(tmp_path, predicting(lambda model, x: x)).predict(given)
    next(made)
    next(made)
    assert log == ["read 0"]
    next(made)
    assert log == ["read 0", "read 1"]
    made.close()
    assert log == ["read 0", "read 1", "closed"]


# --- hooks


class Note(TrainingHook):
    """Writes down its calls; stops after some batches."""

    def __init__(self, stop_after: int = 99) -> None:
        self.log: list[Any] = []
        self.left = stop_after

    def begin(self) -> None:
        self.log.append("begin")

    def after_create_session(self, session: Any) -> None:
        self.log.append((session.global_step, session.read_global_step(), session.refresh(), session.is_chief))

    def after_run(self, context: Any, values: Any) -> None:
        assert math.isnan(values.loss)
        self.log.append(values.global_step)
        self.left -= 1
        if not self.left:
            context.request_stop()

    def end(self, session: Any) -> None:
        self.log.append("end")


def test_hooks_are_called_around_every_batch(trained: Estimator) -> None:
    hook = Note()
    list(trained.predict(data, hooks=[hook]))
    assert hook.log == ["begin", (3, 3, 3, False), 3, 3, 3, "end"]


def test_hooks_of_the_spec_are_called_too_after_those_of_the_call(trained: Estimator) -> None:
    log: list[str] = []

    class Named(Note):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def begin(self) -> None:
            log.append(self.name)

    hook = Named("spec")

    def with_hook(mode: ModeKeys) -> EstimatorSpec:
        return dataclasses.replace(linear(mode), prediction_hooks=[hook])

    estimator = Estimator(with_hook, trained.model_dir)
    assert len(list(estimator.predict(data, hooks=[Named("call")]))) == 7
    assert log == ["call", "spec"]
    assert hook.log[-2:] == [3, "end"]


def test_a_hook_may_end_the_prediction(trained: Estimator) -> None:
    hook = Note(stop_after=2)
    assert len(list(trained.predict(data, hooks=[hook]))) == 6
    assert hook.log[-1] == "end"


def test_n02_a_caller_who_leaves_early_gets_no_end(trained: Estimator) -> None:
    hook = Note()
    made = trained.predict(data, hooks=[hook])
    next(made)
    made.close()
    assert hook.log == ["begin", (3, 3, 3, False), 3]


# --- values of a checkpoint


def test_q17_names_and_values_of_variables(trained: Estimator) -> None:
    assert trained.get_variable_names() == ["bias", "weight"]
    model = plain(trained)
    assert torch.equal(trained.get_variable_value("weight"), model.get_parameter("weight"))


def test_q17_without_a_checkpoint_there_are_none(tmp_path: Path) -> None:
    estimator = make(tmp_path)
    for ask in (estimator.get_variable_names, lambda: estimator.get_variable_value("weight")):
        with pytest.raises(ValueError, match="there is no checkpoint in .*; train first"):
            ask()


def test_q17_an_unknown_name_is_answered_with_the_nearest(trained: Estimator) -> None:
    with pytest.raises(CheckpointError, match="holds no value 'weights'; did you mean 'weight'?"):
        trained.get_variable_value("weights")


def test_q17_every_name_of_a_tied_weight_has_its_value(tmp_path: Path) -> None:
    def tied(mode: ModeKeys) -> EstimatorSpec:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        model[1].weight = model[0].weight
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return EstimatorSpec(mode, model=model, loss_fn=squared_error, optimizer=optimizer)

    estimator = make(tmp_path, tied).train(lambda: data()[:2])  # BatchNorm wants more than one row
    model = tied(ModeKeys.TRAIN).model
    assert model is not None
    assert estimator.get_variable_names() == sorted(model.state_dict())
    assert torch.equal(estimator.get_variable_value("1.weight"), estimator.get_variable_value("0.weight"))


def test_q17_partitioned_variables_and_those_of_the_program_are_there(tmp_path: Path) -> None:
    strategy = ps.ParameterServerStrategy(variable_partitioner=ps.placement.FixedShards(2))

    def model_fn(mode: ModeKeys) -> EstimatorSpec:
        if mode is ModeKeys.TRAIN:
            ps.Variable(torch.tensor([4.0]), name="mine")
        torch.manual_seed(3)
        model = nn.Linear(3, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return EstimatorSpec(mode, model=model, loss_fn=squared_error, optimizer=optimizer)

    estimator = make(tmp_path, model_fn, train_distribute=strategy).train(data)
    assert estimator.get_variable_names() == ["bias", "mine", "weight"]
    assert estimator.get_variable_value("weight").shape == (4, 3)
    assert estimator.get_variable_value("mine").item() == 4


# --- one process


def test_train_evaluate_train_again_and_predict(tmp_path: Path) -> None:
    """Several calls work in one process, with the default strategy and with one of the program's own."""
    for index, strategy in enumerate((None, ps.CentralStorageStrategy(["cpu:0", "cpu:1"]))):
        estimator = make(tmp_path / str(index), train_distribute=strategy, eval_distribute=strategy)
        losses = []
        for _ in range(3):
            losses.append(estimator.train(data).evaluate(data)["loss"])
            assert len(list(estimator.predict(data))) == 7
        assert losses == sorted(losses, reverse=True)
