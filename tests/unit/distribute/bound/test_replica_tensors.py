"""The tensors that are put into a model's modules when a replica has its turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from paramserver.distribute.bound.replica_tensors import ReplicaTensors

CPU = torch.device("cpu")


class Model(nn.Module):
    """A tied weight, and buffers that are saved and that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("nothing", None)


def replicas(count: int = 2) -> tuple[Any, optim.Optimizer, ReplicaTensors]:
    model = Model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, ReplicaTensors(model, [optimizer], [CPU] * count)


def held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_every_replica_has_tensors_of_its_own() -> None:
    model, _, tensors = replicas(3)
    first = held(model)
    sets = [first]
    for replica in (1, 2):
        tensors.activate(replica)
        sets.append(held(model))
        assert model.first.weight is model.second.weight, "tied on every replica"
        assert all(map(torch.equal, sets[-1], first))
    assert len({id(tensor) for each in sets for tensor in each}) == 3 * len(first)
    tensors.activate(0)
    assert list(map(id, held(model))) == list(map(id, first))
    assert [tuple(map(id, tensors.of(tensor))) for tensor in first] == [
        tuple(map(id, each)) for each in zip(*sets, strict=True)
    ]


def test_a_single_replica_changes_nothing() -> None:
    model, optimizer, tensors = replicas(1)
    before = list(map(id, held(model)))
    for tensor in held(model):
        assert tensors.of(tensor) == (tensor,)
    tensors.activate(0)
    assert (
        list(map(id, held(model))) == before == list(map(id, [*optimizer.param_groups[0]["params"], *model.buffers()]))
    )


def test_param_groups_hold_the_parameters_of_the_active_replica() -> None:
    model, optimizer, tensors = replicas()
    group = optimizer.param_groups[0]
    for replica in (1, 0):
        tensors.activate(replica)
        assert optimizer.param_groups[0] is group
        assert list(map(id, group["params"])) == list(map(id, model.parameters()))


def test_other_replicas_follow_requires_grad_and_hooks() -> None:
    model, _, tensors = replicas()
    model.first.bias.requires_grad_(False)
    handle = model.first.weight.register_hook(lambda gradient: gradient * 3)
    tensors.activate(1)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]
    model.first.weight.sum().backward()
    assert model.first.weight.grad.unique().item() == 3
    tensors.activate(0)
    model.first.bias.requires_grad_(True)
    handle.remove()
    tensors.activate(1)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True]
    model.first.weight.sum().backward()
    assert model.first.weight.grad.unique().item() == 4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_computes_with_the_weights_of_the_active_replica(kind: type[nn.RNNBase]) -> None:
    """It keeps a list of them beside its parameters."""
    model = kind(2, 3)
    tensors = ReplicaTensors(model, [], [CPU, CPU])
    expected = [model(torch.ones(1, 2))[0]]
    tensors.activate(1)
    for parameter in model.parameters():
        parameter.data = parameter.data + 1
    expected.append(model(torch.ones(1, 2))[0])
    assert not torch.equal(*expected)
    for replica in (0, 1):
        tensors.activate(replica)
        assert torch.equal(model(torch.ones(1, 2))[0], expected[replica])


def test_what_is_put_in_the_place_of_a_buffer_is_taken_over() -> None:
    model, _, tensors = replicas()
    place = model.average
    model.average = model.average + 1
    tensors.activate(1)
    assert model.average.tolist() == [0, 0]
    model.average = model.average + 2
    tensors.activate(0)
    assert model.average is place
    assert [each.tolist() for each in tensors.of(place)] == [[1, 1], [2, 2]]


@pytest.mark.parametrize("odd", [torch.zeros(3), torch.zeros(1, dtype=torch.int64), None], ids=["shape", "dtype", "no"])
@pytest.mark.parametrize("name", ["cache", "nothing"])
def test_a_tensor_of_another_kind_stays_in_a_buffers_place(name: str, odd: Tensor | None) -> None:
    """A cache may grow, or be made late; each replica has its own."""
    model, _, tensors = replicas()
    before = getattr(model, name)
    setattr(model, name, odd)
    tensors.activate(1)
    assert getattr(model, name) is (None if before is None else tensors.of(before)[1])
    tensors.activate(0)
    assert getattr(model, name) is odd


def give_gradients(model: nn.Module, tensors: ReplicaTensors) -> None:
    for replica in (1, 0):
        tensors.activate(replica)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)


def gradients_of(model: nn.Module, tensors: ReplicaTensors, replica: int) -> list[bool]:
    tensors.activate(replica)
    return [parameter.grad is not None for parameter in model.parameters()]


@pytest.mark.parametrize("whose", ["model", "optimizer"])
def test_gradients_that_are_removed_outside_of_replicas_are_removed_on_all(whose: str) -> None:
    """The first turn begins with the first replica, which is active already."""
    model, optimizer, tensors = replicas()
    give_gradients(model, tensors)
    tensors.activate(1)
    tensors.activate(0)
    model.zero_grad() if whose == "model" else optimizer.zero_grad()
    tensors.activate(0)
    assert gradients_of(model, tensors, 1) == [False, False]


def test_a_gradient_that_only_another_replica_has_goes_with_the_others() -> None:
    model, _, tensors = replicas()
    give_gradients(model, tensors)
    model.first.bias.grad = None
    tensors.activate(1)
    tensors.activate(0)
    model.zero_grad()
    tensors.activate(0)
    assert gradients_of(model, tensors, 1) == [False, False]


def test_gradients_that_stay_are_kept_on_all() -> None:
    model, _, tensors = replicas()
    give_gradients(model, tensors)
    tensors.activate(1)
    tensors.activate(0)
    model.first.bias.grad = None
    tensors.activate(0)
    assert gradients_of(model, tensors, 1) == [True, False]


def test_what_a_replica_removes_is_its_own() -> None:
    model, _, tensors = replicas()
    give_gradients(model, tensors)
    tensors.activate(1)
    tensors.activate(0)
    tensors.activate(0)  # a turn begins
    model.zero_grad()
    assert gradients_of(model, tensors, 1) == [True, True]


def test_it_shows_what_it_holds() -> None:
    _, _, tensors = replicas()
    tensors.activate(1)
    assert repr(tensors) == "<ReplicaTensors: 4 tensors on 2 replicas, 1 is active>"
