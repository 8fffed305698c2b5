"""A model that torch.compile has wrapped, whole or in part, has the names that it has without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn, optim

from paramserver import estimator as es
from paramserver.distribute.bound.plan import aliases, collect, without_compiling

NAMES = ["0.bias", "0.weight", "1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight"]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))


def whole() -> nn.Module:
    return torch.compile(plain(), backend="eager")


def in_part() -> nn.Module:
    model = plain()
    model[0] = torch.compile(model[0], backend="eager")
    return model


KINDS = [plain, whole, in_part]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 2) for _ in range(4)]


def estimator(make: Callable[[], nn.Module], folder: Path, **options: object) -> es.Estimator:
    def model_fn(mode: es.ModeKeys) -> es.EstimatorSpec:
        model = make()
        return es.EstimatorSpec(
            mode,
            model=model,
            loss_fn=lambda model, features, labels: F.cross_entropy(model(features), labels),
            optimizer=optim.SGD(model.parameters(), lr=0.1),
        )

    return es.Estimator(model_fn, model_dir=str(folder), **options)


@pytest.mark.parametrize("make", KINDS)
def test_variables_have_the_names_of_the_model_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert sorted(variable.spec.name for variable in collect(model, [])) == NAMES
    assert aliases(model) == {}


def test_a_module_that_is_there_compiled_and_not_has_two_names() -> None:
    model = nn.Module()
    model.plain = nn.Linear(2, 2, bias=False)
    model.quick = torch.compile(model.plain, backend="eager")
    assert [variable.spec.name for variable in collect(model, [])] == ["plain.weight"]
    assert aliases(model) == {"quick.weight": "plain.weight"}


def test_a_model_without_compiling_is_the_one_that_was_compiled() -> None:
    model = plain()
    linear = model[0]
    model[0] = torch.compile(linear, backend="eager")
    assert without_compiling(torch.compile(model, backend="eager")) is model
    assert model[0] is linear
    empty = nn.Sequential()
    assert without_compiling(empty) is empty


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("make", KINDS)
def test_checkpoints_exports_and_warm_starts_of_one_fit_the_other(
    make: Callable[[], nn.Module], other: Callable[[], nn.Module], tmp_path: Path
) -> None:
    trained = estimator(make, tmp_path / "run")
    expected = estimator(plain, tmp_path / "plain")
    for each in (trained, expected):
        each.train(batches)
    assert trained.get_variable_names() == NAMES
    resumed = estimator(other, tmp_path / "run")
    assert resumed.evaluate(batches) == expected.evaluate(batches)
    resumed.train(batches)
    expected.train(batches)
    assert resumed.evaluate(batches) == expected.evaluate(batches)
    folder = resumed.export_model(str(tmp_path / "exports"), lambda: torch.zeros(2, 4))
    assert sorted(load_file(f"{folder}/model.safetensors")) == NAMES
    for source in (trained.model_dir, folder):
        warm = estimator(other, tmp_path / Path(source).name / "warm", warm_start_from=source)
        warm.train(batches, max_steps=1)
        assert warm.get_variable_names() == NAMES


@pytest.mark.parametrize("make", KINDS)
def test_a_training_that_is_compiled_is_evaluated_in_memory_by_one_that_is_not(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    trained, evaluated = estimator(make, tmp_path), estimator(plain, tmp_path)
    trained.train(batches, hooks=[es.InMemoryEvaluatorHook(evaluated, batches, every_n_iter=2)])
