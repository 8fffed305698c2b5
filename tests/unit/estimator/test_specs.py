"""EstimatorSpec (Q12, Q14, Q20), TrainSpec and EvalSpec (T01 to T03), FinalExporter (J01)."""

import pytest
import torch

from paramserver.estimator.export.exporters import Exporter, FinalExporter
from paramserver.estimator.hooks.hook import TrainingHook
from paramserver.estimator.hooks.saving import CheckpointSaverListener
from paramserver.estimator.specs import EstimatorSpec, EvalSpec, ModeKeys, TrainSpec

MODEL = torch.nn.Linear(2, 1)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


def loss_fn(model, features, labels):
    return torch.nn.functional.mse_loss(model(features), labels)


def input_fn():
    return []


class Count:
    """A metric, if a useless one."""

    def update(self, *args):
        pass

    def compute(self):
        return 0

    def reset(self):
        pass


class NamelessExporter(FinalExporter):
    """Takes any name."""

    def __init__(self, name):
        self._name = name


PARTS = {"model": MODEL, "loss_fn": loss_fn, "optimizer": OPTIMIZER}


@pytest.mark.parametrize(
    ("mode", "needed"),
    [
        (ModeKeys.TRAIN, ("model", "loss_fn", "optimizer")),
        (ModeKeys.EVAL, ("model", "loss_fn")),
        (ModeKeys.PREDICT, ("model",)),
        ("train", ("model", "loss_fn", "optimizer")),
    ],
)
def test_q20_each_mode_needs_its_parts(mode, needed):
    spec = EstimatorSpec(mode, **{name: PARTS[name] for name in needed})
    assert spec.mode is ModeKeys(mode)
    for missing in needed:
        with pytest.raises(ValueError, match=f"missing {missing}: mode {ModeKeys(mode).name} needs"):
            EstimatorSpec(mode, **{name: PARTS[name] for name in needed if name != missing})


def test_more_parts_than_a_mode_needs_may_be_given():
    assert EstimatorSpec(ModeKeys.PREDICT, **PARTS).optimizer is OPTIMIZER


def test_mode_keys_are_tensorflows_words():
    assert [str(mode) for mode in ModeKeys] == ["train", "eval", "infer"]


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("mode", 1, TypeError, "expected ModeKeys"),
        ("mode", "predict", ValueError, "expected one of 'train', 'eval', 'infer'"),
        ("model", loss_fn, TypeError, "expected Module, got a function"),
        ("loss_fn", 1.0, TypeError, "expected a function"),
        ("optimizer", torch.optim.SGD, TypeError, "expected Optimizer"),
        ("predict_fn", "f", TypeError, "expected a function"),
        ("scheduler", 1, TypeError, "expected LRScheduler"),
        ("eval_metrics", [Count()], TypeError, "expected a dict"),
        ("eval_metrics", {1: Count()}, TypeError, "names that are strings"),
        ("eval_metrics", {"count": Count}, TypeError, "update, compute and reset"),
        ("eval_metrics", {"count": 3}, TypeError, "update, compute and reset"),
        ("eval_metrics", {"loss": Count()}, ValueError, "'loss' is reported anyway"),
        ("eval_metrics", {"global_step": Count()}, ValueError, "'global_step' is reported anyway"),
        ("training_hooks", [TrainingHook], TypeError, r"\[0\]: expected an instance"),
        ("training_chief_hooks", TrainingHook(), TypeError, "put it into a list"),
        ("evaluation_hooks", ["hook"], TypeError, r"\[0\]: expected an instance of TrainingHook, got 'hook'"),
    ],
)
def test_q20_fields_of_a_wrong_type_are_refused(field, value, error, message):
    with pytest.raises(error, match=f"EstimatorSpec: {field}.*{message}"):
        EstimatorSpec(**({"mode": "train"} | PARTS | {field: value}))


def test_a_scheduler_belongs_to_the_optimizer_and_needs_no_metric():
    other = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    for make, optimizer, message in (
        (torch.optim.lr_scheduler.ConstantLR, other, "made for another optimizer"),
        (torch.optim.lr_scheduler.ReduceLROnPlateau, OPTIMIZER, "ReduceLROnPlateau needs a metric"),
    ):
        with pytest.raises(ValueError, match=message):
            EstimatorSpec(ModeKeys.TRAIN, **PARTS, scheduler=make(optimizer))
    scheduler = torch.optim.lr_scheduler.ConstantLR(OPTIMIZER)
    assert EstimatorSpec(ModeKeys.TRAIN, **PARTS, scheduler=scheduler).scheduler is scheduler


class TestSeveralOptimizers:
    """E1: in a list or by name, with schedulers for some of them."""

    first = torch.optim.Adagrad([MODEL.weight], lr=0.1)
    second = torch.optim.Adam([MODEL.bias], lr=0.1)

    def spec(self, optimizer, scheduler=None):
        return EstimatorSpec(ModeKeys.TRAIN, **(PARTS | {"optimizer": optimizer, "scheduler": scheduler}))

    @pytest.mark.parametrize("kind", [list, tuple, lambda given: dict(zip(("tables", "dense"), given, strict=True))])
    def test_they_may_be_given_in_any_form(self, kind):
        schedulers = [torch.optim.lr_scheduler.ConstantLR(each) for each in (self.second, self.first)]
        spec = self.spec(kind([self.first, self.second]), kind(schedulers))
        assert (spec.optimizers, spec.schedulers) == ((self.first, self.second), tuple(schedulers))

    def test_one_of_them_may_have_a_scheduler(self):
        scheduler = torch.optim.lr_scheduler.ConstantLR(self.second)
        assert self.spec({"a": self.first, "b": self.second}, scheduler).schedulers == (scheduler,)
        assert self.spec(self.first).schedulers == ()

    @pytest.mark.parametrize(
        ("optimizer", "error", "message"),
        [
            ([], ValueError, "optimizer: expected one or several, got an empty list"),
            ({}, ValueError, "optimizer: expected one or several, got an empty dict"),
            ([first, MODEL], TypeError, r"optimizer\[1\]: expected Optimizer, got a Linear"),
            ({"dense": first, "tables": 3}, TypeError, r"optimizer\['tables'\]: expected Optimizer, got 3"),
            ([first, second, first], ValueError, r"optimizer\[2\]: the same as optimizer\[0\]; give each once"),
        ],
    )
    def test_what_is_none_is_named(self, optimizer, error, message):
        with pytest.raises(error, match=f"EstimatorSpec: {message}"):
            self.spec(optimizer)

    def test_a_scheduler_of_none_of_them_is_named(self):
        good, other = (torch.optim.lr_scheduler.ConstantLR(each) for each in (self.first, OPTIMIZER))
        with pytest.raises(ValueError, match=r"scheduler\['b'\]: made for another optimizer than the spec's"):
            self.spec([self.first, self.second], {"a": good, "b": other})


def test_t01_train_spec():
    hook, listener = TrainingHook(), CheckpointSaverListener()
    spec = TrainSpec(input_fn, max_steps=5, hooks=[hook], saving_listeners=iter([listener]))
    assert (spec.hooks, spec.saving_listeners, spec.max_steps) == ((hook,), (listener,), 5)
    assert TrainSpec(input_fn, hooks=None) == TrainSpec(input_fn)
    assert TrainSpec(input_fn).max_steps is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_fn": []}, TypeError, "input_fn: expected a function"),
        ({"max_steps": 0}, ValueError, "max_steps: expected a positive number or None, got 0"),
        ({"max_steps": -1}, ValueError, "max_steps"),
        ({"max_steps": "5"}, TypeError, "max_steps"),
        ({"hooks": [1]}, TypeError, r"hooks\[0\]: expected an instance of TrainingHook, got 1"),
        (
            {"saving_listeners": [TrainingHook()]},
            TypeError,
            r"saving_listeners\[0\]: expected an instance of CheckpointSaverListener",
        ),
    ],
)
def test_t01_train_spec_refuses(changes, error, message):
    with pytest.raises(error, match=f"TrainSpec: {message}"):
        TrainSpec(**({"input_fn": input_fn} | changes))


def test_t02_eval_spec_defaults():
    spec = EvalSpec(input_fn)
    assert (spec.steps, spec.start_delay_secs, spec.throttle_secs, spec.name) == (100, 120, 600, None)
    assert (spec.hooks, spec.exporters) == ((), ())
    assert EvalSpec(input_fn, steps=None).steps is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_fn": None}, TypeError, "input_fn"),
        ({"steps": 0}, ValueError, "steps: expected a positive number"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"name": 3}, TypeError, "name: expected str, got 3"),
        ({"start_delay_secs": -1}, ValueError, "start_delay_secs: expected seconds of at least 0"),
        ({"throttle_secs": -1}, ValueError, "throttle_secs: expected seconds of at least 0"),
        ({"throttle_secs": None}, TypeError, "throttle_secs"),
        ({"hooks": [1]}, TypeError, "hooks"),
        ({"exporters": "final"}, TypeError, "exporters: expected a sequence of Exporter"),
        ({"exporters": [3]}, TypeError, r"exporters\[0\]: expected an instance of Exporter"),
        ({"exporters": NamelessExporter("")}, ValueError, r"exporters\[0\]: name: expected a string"),
        ({"exporters": NamelessExporter(None)}, ValueError, "name"),
        ({"exporters": NamelessExporter(5)}, ValueError, "name"),
        ({"exporters": [FinalExporter("a"), FinalExporter("a")]}, ValueError, "two have the name 'a'"),
    ],
)
def test_t02_t03_eval_spec_refuses(changes, error, message):
    with pytest.raises(error, match=f"EvalSpec: .*{message}"):
        EvalSpec(**({"input_fn": input_fn} | changes))


def test_t03_exporters_are_one_or_several_or_none():
    first, second = FinalExporter("a"), FinalExporter("b")
    assert EvalSpec(input_fn, exporters=None).exporters == ()
    assert EvalSpec(input_fn, exporters=first).exporters == (first,)
    assert EvalSpec(input_fn, exporters=iter([first, second])).exporters == (first, second)


def test_j01_the_final_exporter_exports_the_final_model_only():
    class FakeEstimator:
        def export_model(self, export_path, serving_input_fn, checkpoint_path, assets_extra):
            return f"{checkpoint_path} in {export_path}"

    exporter = FinalExporter("final")
    assert isinstance(exporter, Exporter)
    assert exporter.export(FakeEstimator(), "out", "ckpt-1", {}, False) is None
    assert exporter.export(FakeEstimator(), "out", "ckpt-2", {}, True) == "ckpt-2 in out"


@pytest.mark.parametrize("name", ["", None, 3, "a/b", ".."])
def test_an_exporter_is_named_like_a_folder(name):
    with pytest.raises(ValueError, match="FinalExporter: name"):
        FinalExporter(name)
