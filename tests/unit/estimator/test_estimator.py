"""The Estimator in one process: what it asks of functions, what it writes, how it goes on (Q01 to Q14, T14, T25)."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import load_model as load_plain
from torch import nn

from paramserver import CentralStorageStrategy, Variable
from paramserver.errors import CheckpointError, ConfigError
from paramserver.estimator import (
    CheckpointSaverHook,
    CheckpointSaverListener,
    Estimator,
    EstimatorSpec,
    ModeKeys,
    NanLossDuringTrainingError,
    RunConfig,
    TrainingHook,
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def squared_error(model, features, labels):
    return ((model(features)[:, 0] - labels) ** 2).mean()


def model_fn(mode):
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    return EstimatorSpec(
        mode, model=model, loss_fn=squared_error, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )


def batch(index):
    generator = torch.Generator().manual_seed(index)
    features = torch.rand(4, 3, generator=generator)
    return features, features.sum(1)


def endless():
    index = 0
    while True:
        yield batch(index)
        index += 1


def three():
    return [batch(index) for index in range(3)]


def make(tmp_path, fn=model_fn, params=None, **config):
    return Estimator(fn, str(tmp_path / "run"), RunConfig(**({"save_checkpoints_steps": 100} | config)), params)


def checkpoints(estimator):
    return sorted(path.name for path in Path(estimator.model_dir).glob("ckpt-*"))


# --- what is asked of functions and arguments


def test_q02_both_functions_get_what_they_name(tmp_path):
    seen = {}

    def build(mode, params, config):
        seen["model_fn"] = (mode, params, config.model_dir)
        return model_fn(mode)

    def data(mode, params, input_context):
        seen["input_fn"] = (mode, params, input_context.num_input_pipelines)
        return three()

    estimator = make(tmp_path, build, {"lr": 1}).train(data)
    assert seen == {
        "model_fn": (ModeKeys.TRAIN, {"lr": 1}, estimator.model_dir),
        "input_fn": (ModeKeys.TRAIN, {"lr": 1}, 1),
    }
    estimator.evaluate(data)
    assert seen["model_fn"][0] is seen["input_fn"][0] is ModeKeys.EVAL


@pytest.mark.parametrize(
    ("fn", "params", "message"),
    [
        (None, None, "expected a function returning an EstimatorSpec, got None"),
        (lambda mode, size: None, None, "asks for an argument 'size'; it may ask for mode, params, config"),
        (lambda mode: None, {"lr": 1}, "no argument 'params'"),
    ],
)
def test_q01_model_fn_is_checked_at_once(tmp_path, fn, params, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, fn, params)


def test_q01_params_that_are_asked_for_and_not_given_are_warned_of(tmp_path, caplog):
    make(tmp_path, lambda mode, params: model_fn(mode))
    assert "model_fn asks for params" in caplog.text


def test_q04_model_fn_must_return_a_spec(tmp_path):
    with pytest.raises(ConfigError, match="model_fn must return an EstimatorSpec, got a Linear"):
        make(tmp_path, lambda: nn.Linear(1, 1)).train(three)


def test_q05_a_config_is_a_run_config(tmp_path):
    with pytest.raises(ConfigError, match="config: expected a RunConfig, got a dict"):
        Estimator(model_fn, str(tmp_path), {"model_dir": "a"})


def test_q05_model_dir_must_not_differ(tmp_path):
    with pytest.raises(ConfigError, match="model_dir is 'a', but the config says 'b'"):
        Estimator(model_fn, "a", RunConfig(model_dir="b"))
    assert Estimator(model_fn, "a", RunConfig(model_dir="a")).model_dir == "a"


def test_q05_without_a_model_dir_there_is_a_temporary_one(caplog):
    estimator = Estimator(model_fn)
    assert "temporary folder" in caplog.text
    Path(estimator.model_dir).rmdir()


def test_q05_params_are_copies(tmp_path):
    given = {"sizes": [1]}
    estimator = make(tmp_path, lambda mode, params: None, given)
    given["sizes"].append(2)
    estimator.params["sizes"].append(3)
    assert estimator.params == {"sizes": [1]}


def test_q06_what_train_and_evaluate_relies_on_is_not_overridden():
    with pytest.raises(ValueError, match="Mine overrides evaluate, train of Estimator"):
        type("Mine", (Estimator,), {"train": None, "evaluate": None, "tune": None})

    class Other(Estimator):
        """Adds to it."""

        def tune(self):
            return self.evaluate(three)

    assert issubclass(Other, Estimator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1, "max_steps": 2}, "steps and max_steps cannot both be set"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"max_steps": -1}, "max_steps: expected a positive number, got -1"),
    ],
)
def test_q07_steps_are_checked(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path).train(three, **arguments)


@pytest.mark.parametrize("argument", ["hooks", "saving_listeners"])
def test_q07_hooks_and_listeners_are_checked(tmp_path, argument):
    with pytest.raises(TypeError, match=argument):
        make(tmp_path).train(three, **{argument: ["hook"]})


@pytest.mark.parametrize("role", ["chief", "worker", "ps", "evaluator"])
def test_t25_q08_a_task_of_a_cluster_does_not_train_by_itself(tmp_path, monkeypatch, role):
    cluster = {"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": role, "index": 0}}))
    with pytest.raises(ConfigError, match=f"Estimator.train on {role}:0: .* train_and_evaluate"):
        make(tmp_path).train(three)


# --- steps and checkpoints


def test_q07_steps_add_up_and_max_steps_is_absolute(tmp_path):
    estimator = make(tmp_path)
    assert estimator.train(endless, steps=2) is estimator
    estimator.train(endless, steps=3)
    assert estimator.latest_checkpoint().endswith("ckpt-5")
    estimator.train(endless, max_steps=7)
    assert estimator.latest_checkpoint().endswith("ckpt-7")


def test_q09_checkpoints_at_the_start_and_at_the_end(tmp_path):
    estimator = make(tmp_path).train(endless, steps=5)
    state = json.loads(Path(estimator.model_dir, "checkpoint").read_text())
    assert state["retained"] == ["ckpt-0", "ckpt-5"]
    assert (state["latest"], state["finished"]) == ("ckpt-5", True)
    assert checkpoints(estimator) == ["ckpt-0", "ckpt-5"]


def test_q09_a_model_dir_can_be_moved(tmp_path):
    make(tmp_path).train(endless, steps=5)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = Estimator(model_fn, str(tmp_path / "moved"), RunConfig(save_checkpoints_steps=100))
    assert moved.train(endless, steps=2).latest_checkpoint() == str(tmp_path / "moved" / "ckpt-7")


def test_a_relative_model_dir_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimator = Estimator(model_fn, "here", RunConfig(save_checkpoints_steps=100))
    estimator.train(endless, steps=2).train(endless, steps=2)
    assert estimator.latest_checkpoint() == "here/ckpt-4"


def test_t14_training_is_skipped_when_max_steps_is_reached(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    estimator = make(tmp_path).train(endless, steps=5)

    def forbidden():
        raise AssertionError

    estimator.train(forbidden, max_steps=5)
    assert "training is skipped" in caplog.text


def test_the_input_ends_the_training(tmp_path):
    assert make(tmp_path).train(three).latest_checkpoint().endswith("ckpt-3")


def test_q11_empty_input_is_warned_of(tmp_path, caplog):
    make(tmp_path).train(list)
    assert "training made no steps" in caplog.text


def test_q11_nan_ends_the_training_after_the_users_hooks(tmp_path):
    seen = []

    class Look(TrainingHook):
        def after_run(self, context, values):
            seen.append(float(values.loss))

    def poisoned():
        yield batch(0)
        yield torch.full((4, 3), math.nan), torch.zeros(4)

    estimator = make(tmp_path)
    with pytest.raises(NanLossDuringTrainingError, match="at global step 1"):
        estimator.train(poisoned, hooks=[Look()])
    assert len(seen) == 2
    assert math.isnan(seen[1])
    assert checkpoints(estimator) == ["ckpt-0"]


def test_q20_a_loss_of_many_elements_is_refused(tmp_path):
    def per_example(mode):
        spec = model_fn(mode)
        return EstimatorSpec(mode, model=spec.model, optimizer=spec.optimizer, loss_fn=lambda m, x, y: m(x))

    with pytest.raises(ConfigError, match="loss_fn must return a tensor of one element"):
        make(tmp_path, per_example).train(three)


class Listener(CheckpointSaverListener):
    """Writes down the checkpoints."""

    def __init__(self):
        self.steps = []

    def after_save(self, session, step):
        self.steps.append(step)


def test_q10_listeners_are_told_of_every_checkpoint(tmp_path):
    listener = Listener()
    make(tmp_path, save_checkpoints_steps=2).train(endless, steps=5, saving_listeners=[listener])
    assert listener.steps == [0, 2, 4, 5]


def test_q10_a_saver_of_the_users_own_replaces_the_default_and_gets_the_listeners(tmp_path):
    listener, saver = Listener(), CheckpointSaverHook(save_steps=3)
    make(tmp_path, save_checkpoints_steps=1).train(endless, steps=5, hooks=[saver], saving_listeners=[listener])
    assert listener.steps == [0, 3, 5]
    assert saver.listeners == ()  # what the user passed in is not changed (C21)


def test_q10_listeners_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoints are saved"):
        make(tmp_path, save_checkpoints_steps=None).train(three, saving_listeners=[Listener()])


def test_without_checkpoints_none_is_written(tmp_path):
    estimator = make(tmp_path, save_checkpoints_steps=None).train(three)
    assert checkpoints(estimator) == []


def test_a_user_function_that_fails_is_not_wrapped(tmp_path):
    def broken():
        yield batch(0)
        raise LookupError("no such file")

    with pytest.raises(LookupError, match="no such file"):
        make(tmp_path).train(broken)


def test_an_end_hook_that_fails_leaves_the_last_checkpoint_and_no_end(tmp_path):
    class Fail(TrainingHook):
        def end(self, session):
            raise LookupError("at the end")

    estimator = make(tmp_path)
    with pytest.raises(LookupError, match="at the end"):
        estimator.train(endless, steps=5, hooks=[Fail()])
    assert checkpoints(estimator) == ["ckpt-0", "ckpt-5"]
    assert json.loads(Path(estimator.model_dir, "checkpoint").read_text())["finished"] is False


def test_q22_the_seed_is_set_before_the_model_is_built(tmp_path):
    def unseeded(mode):
        model = nn.Linear(3, 1)
        return EstimatorSpec(
            mode, model=model, loss_fn=squared_error, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        )

    first = make(tmp_path / "a", unseeded, seed=5).evaluate(three)
    torch.rand(7)
    assert make(tmp_path / "b", unseeded, seed=5).evaluate(three) == first


# --- checkpoints that are damaged


@pytest.fixture
def trained(tmp_path):
    return make(tmp_path).train(endless, steps=5)


def test_a_checkpoint_that_is_cut_short_is_one_clear_error(trained):
    file = next(Path(trained.latest_checkpoint()).glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    for use in (trained.train, trained.evaluate):
        with pytest.raises(CheckpointError, match=f"{file} cannot be read.*cut short"):
            use(three)
    with pytest.raises(CheckpointError, match="cut short"):
        trained.export_model(str(Path(trained.model_dir, "export")))
    assert not Path(trained.model_dir, "export").exists()


def test_a_checkpoint_without_its_index_is_not_passed_over(trained):
    Path(trained.latest_checkpoint(), "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="ckpt-5 is cut short: it has no model.safetensors.index.json"):
        trained.train(three)


def test_b02_a_checkpoint_that_is_gone_means_a_new_beginning(trained, caplog):
    shutil.rmtree(trained.latest_checkpoint())
    assert trained.latest_checkpoint() is None
    trained.train(three)
    assert "is gone; training starts from the beginning" in caplog.text
    assert trained.latest_checkpoint().endswith("ckpt-3")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, trained):
    def wider(mode):
        model = nn.Linear(4, 1)
        return EstimatorSpec(
            mode, model=model, loss_fn=squared_error, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        )

    other = make(tmp_path, wider)
    with pytest.raises(CheckpointError, match=r"'weight' is float32\[1, 3\], this model has float32\[1, 4\]"):
        other.train(three)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        other.evaluate(three)


def test_a_model_dir_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    estimator = Estimator(model_fn, str(tmp_path / "file" / "run"), RunConfig(save_checkpoints_steps=100))
    with pytest.raises(CheckpointError, match="cannot be written"):
        estimator.train(three)


# --- evaluation, export, plain PyTorch


def test_q14_evaluate_reads_a_checkpoint_and_reports_its_step(trained):
    results = trained.evaluate(three)
    assert set(results) == {"loss", "global_step"}
    assert results["global_step"] == 5
    before = trained.evaluate(three, checkpoint_path=str(Path(trained.model_dir, "ckpt-0")))
    assert before["global_step"] == 0
    assert before["loss"] > results["loss"]


def test_q14_without_a_checkpoint_the_fresh_model_is_evaluated(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert make(tmp_path).evaluate(three, steps=1)["global_step"] == 0
    assert "evaluating the model as it is built" in caplog.text


def test_q14_steps_must_be_positive(trained):
    with pytest.raises(ConfigError, match="evaluate: steps: expected a positive number, got 0"):
        trained.evaluate(three, steps=0)


def test_q15_each_evaluation_has_a_folder_of_its_own(trained):
    trained.evaluate(three)
    trained.evaluate(three, name="test")
    for folder in ("eval", "eval_test"):
        assert list(Path(trained.model_dir, folder).glob("events.out.tfevents.*"))


def test_an_evaluation_changes_no_random_state(trained):
    state = torch.get_rng_state()
    trained.evaluate(three)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_hooks_come_from_the_caller_and_the_spec(tmp_path):
    log = []

    class Note(TrainingHook):
        def __init__(self, name):
            self.name = name

        def begin(self):
            log.append(self.name)

    def build(mode):
        spec = model_fn(mode)
        return EstimatorSpec(mode, model=spec.model, loss_fn=spec.loss_fn, evaluation_hooks=[Note("spec")])

    make(tmp_path, build).evaluate(three, hooks=[Note("caller")])
    assert log == ["caller", "spec"]


class Tied(nn.Module):
    """Two names for one weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, features):
        return self.norm(self.second(self.first(features)))


def tied_fn(mode):
    torch.manual_seed(1)
    model = Tied()
    return EstimatorSpec(
        mode, model=model, loss_fn=squared_error, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )


def test_tied_weights_train_and_evaluate(tmp_path):
    estimator = make(tmp_path, tied_fn).train(endless, steps=5)
    estimator.train(endless, steps=5)
    assert estimator.evaluate(three)["global_step"] == 10


def test_b06_checkpoints_and_exports_load_into_plain_pytorch(tmp_path):
    estimator = make(tmp_path, tied_fn).train(endless, steps=5)
    checkpoint = Path(estimator.latest_checkpoint())
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert index["metadata"]["aliases"] == {"second.weight": "first.weight"}
    plain = load_file(checkpoint / index["weight_map"]["first.weight"])
    model = Tied()
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert (missing, unexpected) == (["second.weight"], [])

    exported = Path(estimator.export_model(str(tmp_path / "export")))
    assert [path.name for path in exported.iterdir()] == ["model.safetensors"]
    again = Tied()
    load_plain(again, exported / "model.safetensors")
    features, labels = batch(0)
    expected = estimator.evaluate(lambda: [(features, labels)])["loss"]
    for loaded in (model, again):
        assert squared_error(loaded.eval(), features, labels).item() == pytest.approx(expected)


def test_q17_export_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no checkpoint in .*; train first"):
        make(tmp_path).export_model(str(tmp_path / "export"))


def test_two_exports_in_one_second_have_folders_of_their_own(trained):
    first, second = (trained.export_model(str(Path(trained.model_dir, "export"))) for _ in range(2))
    assert first != second


def test_an_estimator_shows_where_it_is(trained):
    assert repr(trained) == f"<Estimator in {trained.model_dir}, latest checkpoint {trained.model_dir}/ckpt-5>"


# --- batches of features alone


def test_batches_of_features_alone_train_and_evaluate(tmp_path):
    """As an autoencoder has them; the loss_fn and the metrics get None for the labels."""
    seen = []

    class Seen:
        def update(self, predictions, labels):
            seen.append(labels)

        def compute(self):
            return 1.0

        def reset(self):
            seen.clear()

    def autoencoder_fn(mode):
        model = nn.Linear(3, 3)

        def loss_fn(model, features, labels):
            assert labels is None
            return (model(features) - features).square().mean()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return EstimatorSpec(mode, model=model, loss_fn=loss_fn, optimizer=optimizer, eval_metrics={"seen": Seen()})

    def alone():
        return [features for features, _ in three()]

    estimator = Estimator(autoencoder_fn, str(tmp_path)).train(alone)
    assert estimator.evaluate(alone)["global_step"] == 3
    assert seen == [None] * 3
    strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
    Estimator(autoencoder_fn, str(tmp_path / "two"), RunConfig(train_distribute=strategy)).train(lambda: alone() * 2)
    assert strategy.global_step == 3


# --- what a checkpoint holds beside the model


def wider_fn(mode):
    spec = model_fn(mode)
    spec.model.more = nn.Linear(3, 2)
    return EstimatorSpec(mode, model=spec.model, loss_fn=spec.loss_fn, optimizer=spec.optimizer)


LEFT_OUT = "holds 2 variables that the model does not have, and that are left out: 'more.bias', 'more.weight'"


def test_variables_that_the_model_does_not_have_are_told_of(tmp_path, caplog):
    for name in ("trained", "evaluated"):
        Estimator(wider_fn, str(tmp_path / name)).train(three)
    assert "left out" not in caplog.text
    Estimator(model_fn, str(tmp_path / "trained")).train(three)
    assert caplog.text.count(f"ckpt-3 {LEFT_OUT}") == 1
    caplog.clear()
    estimator = Estimator(model_fn, str(tmp_path / "evaluated"))
    for _ in range(3):
        estimator.evaluate(three)
    assert caplog.text.count(LEFT_OUT) == 1, "once, and not for each evaluation"


def test_a_programs_own_variables_are_none_of_these(tmp_path, caplog):
    def with_variable(mode):
        if mode is ModeKeys.TRAIN:
            Variable(0, name="seen")
        return model_fn(mode)

    Estimator(with_variable, str(tmp_path)).train(three)
    assert "seen" in Estimator(model_fn, str(tmp_path)).get_variable_names()
    Estimator(model_fn, str(tmp_path)).train(three).evaluate(three)
    assert "left out" not in caplog.text
