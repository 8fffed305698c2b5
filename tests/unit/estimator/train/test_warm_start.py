"""Warm start (Q18): from where, which variables, under which names, and when."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramserver as ps
from paramserver.checkpoint.saved_values import SavedValues
from paramserver.errors import CheckpointError, ConfigError
from paramserver.estimator import Estimator, EstimatorSpec, ModeKeys, RunConfig, WarmStartSettings
from paramserver.estimator.train.warm_start import warm_start


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)


class Net(nn.Module):
    """Parameters, one of them frozen, and buffers."""

    def __init__(self, seed: int, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(width, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
        self.encoder.bias.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(features)))


def squared_error(model: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    return (model(features)[:, 0] - labels).square().mean()


def building(seed: int) -> Callable[[ModeKeys], EstimatorSpec]:
    def model_fn(mode: ModeKeys) -> EstimatorSpec:
        model = Net(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        return EstimatorSpec(mode, model=model, loss_fn=squared_error, optimizer=optimizer)

    return model_fn


def data() -> list[tuple[Tensor, Tensor]]:
    features = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(1))
    return [(part, part.sum(1)) for part in features]


def make(model_dir: Path, seed: int = 1, warm_start_from: Any = None, **config: Any) -> Estimator:
    options = {"save_checkpoints_steps": 100, "log_step_count_steps": None} | config
    return Estimator(building(seed), str(model_dir), RunConfig(**options), warm_start_from=warm_start_from)


@pytest.fixture
def trained(tmp_path: Path) -> Estimator:
    return make(tmp_path / "trained").train(data)


def saved(estimator: Estimator) -> dict[str, Tensor]:
    return {name: estimator.get_variable_value(name) for name in estimator.get_variable_names()}


def warmed(estimator: Estimator, **settings: Any) -> dict[str, tuple[bool, bool]]:
    """Of each variable of another model, whether it took the trained value, and whether it kept its own."""
    model, fresh = Net(2), Net(2).state_dict()
    warm_start(model, WarmStartSettings(str(estimator.latest_checkpoint()), **settings))
    source = saved(estimator)
    return {
        name: (torch.equal(value, source[name]), torch.equal(value, fresh[name]))
        for name, value in model.state_dict().items()
    }


def taken(estimator: Estimator, **settings: Any) -> set[str]:
    return {name for name, (is_taken, is_own) in warmed(estimator, **settings).items() if is_taken and not is_own}


ENCODER = {"encoder.weight", "encoder.bias"}
HEAD = {"head.weight", "head.bias"}
NORM = {"norm.weight", "norm.bias"}
BUFFERS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


# --- which variables


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (".*", ENCODER | HEAD | NORM),
        ("encoder", ENCODER),
        ("head.weight", {"head.weight"}),
        ("encoder|head", ENCODER | HEAD),
        (r".*\.weight", {"encoder.weight", "norm.weight", "head.weight"}),
        (["head.bias", "encoder.weight"], {"head.bias", "encoder.weight"}),
        (("encoder", "norm.running"), ENCODER | {"norm.running_mean", "norm.running_var"}),
        ([".*"], ENCODER | HEAD | NORM | BUFFERS),
    ],
)
def test_q18_one_expression_chooses_parameters_and_a_list_buffers_as_well(
    trained: Estimator, chosen: Any, expected: set[str]
) -> None:
    assert taken(trained, vars_to_warm_start=chosen) == expected


def test_q18_by_default_all_parameters_are_taken(trained: Estimator) -> None:
    assert taken(trained) == ENCODER | HEAD | NORM


def test_a_name_means_that_variable_alone(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.w_other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    save_file({"w": torch.ones(1), "w_other": torch.ones(1)}, tmp_path / "two.safetensors")
    for chosen, expected in (("w", 0), ("w.*", 1)):
        model = Two()
        warm_start(model, WarmStartSettings(str(tmp_path / "two.safetensors"), vars_to_warm_start=chosen))
        assert (model.w.item(), model.w_other.item()) == (1, expected)


@pytest.mark.parametrize("chosen", ["decoder", ["encoder", "decoder"], ["running_mean"]])
def test_an_expression_that_chooses_nothing_is_a_mistake(trained: Estimator, chosen: Any) -> None:
    with pytest.raises(ConfigError, match="is not the name of a variable, and matches the beginning of none"):
        warmed(trained, vars_to_warm_start=chosen)


# --- under which names


def test_q18_a_variable_may_have_had_another_name(tmp_path: Path) -> None:
    save_file({"old": torch.full((4, 3), 5.0), "bias": torch.full((4,), 6.0)}, tmp_path / "old.safetensors")
    model = Net(2)
    names = {"encoder.weight": "old", "encoder.bias": "bias"}
    path = str(tmp_path / "old.safetensors")
    warm_start(model, WarmStartSettings(path, vars_to_warm_start="encoder", var_name_to_prev_var_name=names))
    assert model.encoder.weight.unique().item() == 5
    assert model.encoder.bias.unique().item() == 6


def test_q18_names_that_are_not_used_are_a_mistake(trained: Estimator) -> None:
    with pytest.raises(ConfigError, match=r"has \['head.weight'\], which vars_to_warm_start does not choose"):
        warmed(trained, vars_to_warm_start="encoder", var_name_to_prev_var_name={"head.weight": "x"})


def test_a_value_that_is_missing_is_named(trained: Estimator) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match=r"warm start of '0.weight' from .*: it holds no value '0.weight', only"):
        warm_start(model, WarmStartSettings(trained.model_dir))


def test_q18_another_shape_is_one_clear_error(trained: Estimator) -> None:
    message = r"'encoder.weight' from .*: expected a value of shape \[4, 7\], got \[4, 3\] of 'encoder.weight'"
    with pytest.raises(CheckpointError, match=message):
        warm_start(Net(2, width=7), WarmStartSettings(trained.model_dir))


def test_another_dtype_is_converted(trained: Estimator) -> None:
    model = Net(2).to(torch.float64)
    warm_start(model, WarmStartSettings(trained.model_dir))
    assert model.head.weight.dtype is torch.float64
    assert torch.equal(model.head.weight.float(), trained.get_variable_value("head.weight"))


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.add_module(first, nn.Linear(3, 3, bias=False))
        self.add_module(second, nn.Linear(3, 3, bias=False))
        self.get_submodule(second).weight = self.get_submodule(first).weight


def test_a_tied_weight_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    save_file({"b.weight": torch.ones(3, 3)}, tmp_path / "weights.safetensors")
    model = Tied("a", "b")
    warm_start(model, WarmStartSettings(str(tmp_path / "weights.safetensors"), vars_to_warm_start=["a.weight"]))
    assert torch.equal(model.get_parameter("a.weight"), torch.ones(3, 3))


def test_a_tied_weight_fills_two_that_are_not(tmp_path: Path) -> None:
    def model_fn(mode: ModeKeys) -> EstimatorSpec:
        model = Tied("a", "b")
        return EstimatorSpec(
            mode,
            model=model,
            loss_fn=lambda model, x, y: model.a(model.b(x)).square().mean(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )

    estimator = Estimator(model_fn, str(tmp_path / "tied"), RunConfig(save_checkpoints_steps=9)).train(data)
    for place in (estimator.model_dir, estimator.export_model(str(tmp_path / "export"))):
        apart = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "ab"})
        warm_start(apart, WarmStartSettings(place))
        assert torch.equal(apart["a"].weight, apart["b"].weight)
        assert torch.equal(apart["a"].weight, estimator.get_variable_value("b.weight"))


# --- from where


def places(estimator: Estimator, tmp_path: Path) -> dict[str, str]:
    exported = estimator.export_model(str(tmp_path / "export"))
    return {
        "checkpoint": str(estimator.latest_checkpoint()),
        "model_dir": estimator.model_dir,
        "exported model": exported,
        "file": str(Path(exported, "model.safetensors")),
    }


@pytest.mark.parametrize("kind", ["checkpoint", "model_dir", "exported model", "file"])
def test_q18_values_come_from_any_place_where_they_are_saved(
    tmp_path: Path, trained: Estimator, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = places(trained, tmp_path)[kind]
    model = Net(2)
    warm_start(model, WarmStartSettings(path, vars_to_warm_start=[".*"]))
    for name, value in saved(trained).items():
        assert torch.equal(model.state_dict()[name], value)
    assert f"9 variables begin with values of {path}" in caplog.text


def test_a_checkpoint_of_a_partitioned_model_is_one_like_others(tmp_path: Path) -> None:
    strategy = ps.ParameterServerStrategy(variable_partitioner=ps.placement.FixedShards(3))
    estimator = make(tmp_path / "parts", train_distribute=strategy).train(data)
    assert taken(estimator, vars_to_warm_start="encoder") == ENCODER


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint, exported model or safetensors file"),
        ("folder", "holds no saved values: expected model.safetensors.index.json of a checkpoint"),
        ("file", "cannot be read as safetensors: .*; was it cut short?"),
    ],
)
def test_a_place_without_values_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    place = tmp_path / "place"
    if content == "folder":
        place.mkdir()
    elif content == "file":
        place.write_text("no tensors")
    with pytest.raises(CheckpointError, match=message):
        SavedValues.at(str(place))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ckpt_to_initialize_from": ""}, "ckpt_to_initialize_from: expected a path, got ''"),
        ({"ckpt_to_initialize_from": None}, "ckpt_to_initialize_from: expected a path, got None"),
        ({"vars_to_warm_start": None}, "vars_to_warm_start: expected a regular expression, .* got None"),
        ({"vars_to_warm_start": ["a", 3]}, "vars_to_warm_start: expected a regular expression, .* got 3"),
        ({"vars_to_warm_start": "("}, r"'\(' is not a regular expression"),
        ({"var_name_to_prev_var_name": {"a": 1}}, "expected a dict of names to names"),
        ({"var_name_to_prev_var_name": "a"}, "expected a dict of names to names"),
    ],
)
def test_q18_settings_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmStartSettings(**({"ckpt_to_initialize_from": "run"} | arguments))


@pytest.mark.parametrize("wrong", [3, {"path": "run"}, Net])
def test_q18_what_is_no_path_and_no_settings_is_refused(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ValueError, match="warm_start_from: expected a path or WarmStartSettings, got a"):
        make(tmp_path, warm_start_from=wrong)
    with pytest.raises(ValueError, match="expected a path, got ''"):
        make(tmp_path, warm_start_from="")


# --- when


def test_q18_a_training_begins_with_the_values_and_goes_on_from_its_own(tmp_path: Path, trained: Estimator) -> None:
    source = saved(trained)
    other = make(tmp_path / "other", seed=2, warm_start_from=trained.model_dir).train(data)
    begun = SavedValues.at(str(Path(other.model_dir, "ckpt-0")))
    for name in ENCODER | HEAD | NORM:
        assert torch.equal(begun.read(name), source[name])
    assert not torch.equal(begun.read("norm.running_mean"), source["norm.running_mean"])
    after = saved(other)
    again = make(tmp_path / "other", seed=2, warm_start_from=str(tmp_path / "gone")).train(data, steps=1)
    assert again.latest_checkpoint() == str(tmp_path / "other" / "ckpt-4")
    assert not torch.equal(after["head.weight"], source["head.weight"])


def test_q18_a_path_of_any_kind_will_do(tmp_path: Path, trained: Estimator) -> None:
    other = make(tmp_path / "other", seed=2, warm_start_from=Path(trained.model_dir))
    assert other.evaluate(data)["loss"] != make(tmp_path / "cold", seed=2).evaluate(data)["loss"]


def test_q18_an_evaluation_without_a_checkpoint_begins_with_the_values(
    tmp_path: Path, trained: Estimator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = WarmStartSettings(trained.model_dir, vars_to_warm_start=[".*"])
    other = make(tmp_path / "other", seed=2, warm_start_from=settings)
    assert other.evaluate(data)["loss"] == trained.evaluate(data)["loss"]
    assert other.evaluate(data)["global_step"] == 0
    assert "evaluating the model as it is warm-started" in caplog.text


def test_only_the_chief_reads_the_values(tmp_path: Path) -> None:
    """Others get what the chief has put onto the ps tasks: the files need not be there for them."""
    estimator = make(tmp_path / "other", warm_start_from=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="there is no checkpoint, exported model or safetensors file"):
        estimator.train(data)
    assert estimator._build(ModeKeys.TRAIN, is_first=False).model is not None
