"""Calling a user's functions by what they name (Q01, Q02), and what they may return (Q03, Q20)."""

import functools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from paramserver.errors import ConfigError
from paramserver.estimator.calling import accepts, as_loss, batches_of, call_with_named

OFFERED = {"mode": "train", "params": {"lr": 1}, "config": None}


class Model:
    """A callable that is no function."""

    def __call__(self, params, *, mode="none"):
        return params, mode


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda: (), ()),
        (lambda mode: mode, "train"),
        (lambda params, mode: (params, mode), ({"lr": 1}, "train")),
        (lambda mode, size=3: (mode, size), ("train", 3)),
        (lambda **named: sorted(named), ["config", "mode", "params"]),
        (lambda *rest: rest, ()),
        (functools.partial(lambda size, mode: (size, mode), 5), (5, "train")),
        (Model(), ({"lr": 1}, "train")),
    ],
)
def test_q02_a_function_gets_what_it_names(fn, expected):
    assert call_with_named(fn, OFFERED) == expected


def test_q01_a_function_that_needs_something_else_is_refused():
    def build(mode, hidden):
        raise AssertionError

    with pytest.raises(ConfigError, match="build asks for an argument 'hidden'; it may ask for mode, params, config"):
        call_with_named(build, OFFERED)


def test_q01_an_argument_that_cannot_be_named_is_refused():
    with pytest.raises(ConfigError, match="asks for an argument 'mode'"):
        call_with_named(lambda mode, /: mode, OFFERED)


def test_accepts():
    assert accepts(lambda params: params, "params")
    assert accepts(lambda **named: named, "params")
    assert not accepts(lambda mode: mode, "params")
    assert not accepts(lambda params, /: params, "params")


class Batches(Dataset):
    """A map-style Dataset whose items are batches."""

    def __getitem__(self, index):
        return torch.full((2, 3), index), torch.zeros(2)

    def __len__(self):
        return 3


@pytest.mark.parametrize(
    "data",
    [
        Batches(),
        DataLoader(TensorDataset(torch.zeros(6, 3), torch.zeros(6)), batch_size=2),
        [(torch.zeros(2, 3), torch.zeros(2))] * 3,
        ([torch.zeros(2, 3), torch.zeros(2)] for _ in range(3)),
    ],
    ids=["dataset", "loader", "list", "generator"],
)
def test_z20_batches_come_from_any_iterable(data):
    batches = list(batches_of(data, "train_input"))
    assert [(features.shape, labels.shape) for features, labels in batches] == [((2, 3), (2,))] * 3


@pytest.mark.parametrize(
    ("data", "got"),
    [
        ([(1, 2, 3)], "a tuple of length 3"),
        ([[]], "a list of length 0"),
        ((torch.zeros(2, 3), torch.zeros(2)), "a Tensor"),
    ],
)
def test_q03_a_batch_is_a_pair(data, got):
    with pytest.raises(ConfigError, match=f"train_input: expected batches that are pairs .*, got {got}"):
        list(batches_of(data, "train_input"))


@pytest.mark.parametrize("features", [torch.zeros(2), {"a": torch.zeros(2)}, np.zeros(2)])
def test_a_batch_may_be_features_alone(features):
    ((found, labels), (listed, none)) = batches_of([features, [features]], "train_input")
    assert listed is features
    assert none is None
    assert found is features
    assert labels is None


def test_what_is_no_input_is_refused():
    with pytest.raises(ConfigError, match="train_input: expected a DataLoader, .* got None"):
        list(batches_of(None, "train_input"))


def test_q20_a_loss_is_a_tensor_of_one_element():
    assert as_loss(torch.ones(())).item() == as_loss(torch.ones(1, 1)).item() == 1
    with pytest.raises(ConfigError, match=r"one element, got a Tensor of shape \[4\]; reduce it"):
        as_loss(torch.ones(4))
    for value in (1.0, None, [torch.ones(())]):
        with pytest.raises(TypeError, match=f"one element, got a {type(value).__name__}") as caught:
            as_loss(value)
        assert isinstance(caught.value, ConfigError), "as all that the Estimator refuses"
