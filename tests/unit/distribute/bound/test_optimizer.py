"""The optimizer that prepare gives back, beside the one that it was made from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import paramserver as ps
from paramserver.client.client import PushResult
from paramserver.distribute.bound.optimizer import PreparedOptimizer
from paramserver.distribute.bound.optimizer_state import carried
from paramserver.errors import ConfigError


class Pusher:
    """A model that counts pushes instead of making any, with replicas of its parameters."""

    def __init__(self) -> None:
        self.count = 0
        self.others: dict[int, torch.Tensor] = {}

    def hold(self, owner: int, groups: object) -> None:
        self.held = (owner, groups)

    def step(self, owner: int) -> PushResult:
        self.count += 1
        return PushResult(self.count, owner)

    def on_each_replica(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return parameter, *([self.others[id(parameter)]] if id(parameter) in self.others else [])


@pytest.fixture
def original() -> optim.Optimizer:
    return optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def pusher() -> Pusher:
    return Pusher()


@pytest.fixture
def prepared(original: optim.Optimizer, pusher: Pusher) -> PreparedOptimizer:
    return PreparedOptimizer(original, pusher)


def test_a_step_pushes_once(prepared: PreparedOptimizer, pusher: Pusher) -> None:
    assert prepared.last_push is None
    assert prepared.step() is None
    assert (pusher.count, prepared.last_push) == (1, PushResult(1, 0))


def test_a_step_keeps_no_state_here(prepared: PreparedOptimizer) -> None:
    prepared.step()
    assert len(prepared.state) == 0
    assert prepared.state_dict()["state"] == {}
    assert prepared.state_dict()["param_groups"][0]["lr"] == 0.1


def test_it_is_an_optimizer_of_the_same_groups(prepared: PreparedOptimizer, original: optim.Optimizer) -> None:
    assert isinstance(prepared, optim.Optimizer)
    assert prepared.param_groups is original.param_groups
    assert prepared.defaults == original.defaults
    assert "lr: 0.1" in repr(prepared)


def test_more_parameters_are_refused(prepared: PreparedOptimizer) -> None:
    with pytest.raises(ConfigError, match="add_param_group: a prepared optimizer cannot take more parameters"):
        prepared.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_settings_are_loaded_into_the_same_groups(prepared: PreparedOptimizer, original: optim.Optimizer) -> None:
    group = original.param_groups[0]
    saved = copy.deepcopy(prepared.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    prepared.load_state_dict(saved)
    assert prepared.param_groups is original.param_groups
    assert original.param_groups[0] is group
    assert group["lr"] == 0.5


def test_groups_that_do_not_fit_are_not_loaded(prepared: PreparedOptimizer) -> None:
    with pytest.raises(ValueError, match="different number of parameter groups"):
        prepared.load_state_dict({"state": {}, "param_groups": []})


def test_it_cannot_be_copied_or_pickled(prepared: PreparedOptimizer) -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(prepared)


def test_hooks_of_all_optimizers_are_called(prepared: PreparedOptimizer) -> None:
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]
    prepared.step()
    for handle in handles:
        handle.remove()
    prepared.step()
    assert calls == ["before", "after"]


def test_hooks_are_called_once_also_after_loading(prepared: PreparedOptimizer, original: optim.Optimizer) -> None:
    """Loading has torch look for the hooks anew."""
    prepared.load_state_dict(prepared.state_dict())
    calls: list[optim.Optimizer] = []
    original.register_step_pre_hook(lambda optimizer, *_: calls.append(optimizer))
    prepared.step()
    assert calls == [prepared]


def test_a_schedule_of_either_never_warns(prepared: PreparedOptimizer, original: optim.Optimizer) -> None:
    schedules = [optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (original, prepared)]
    prepared.step()
    for schedule in schedules:
        schedule.step()
    assert original.param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_schedule_before_the_first_step_warns_as_ever(prepared: PreparedOptimizer) -> None:
    schedule = optim.lr_scheduler.ExponentialLR(prepared, 0.5)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        schedule.step()


# --- several replicas


@pytest.fixture
def of_two(original: optim.Optimizer, pusher: Pusher) -> PreparedOptimizer:
    """Of a model with two replicas, all of whose parameters have gradients."""
    for parameter in original.param_groups[0]["params"]:
        pusher.others[id(parameter)] = nn.Parameter(parameter.detach().clone())
        for each in pusher.on_each_replica(parameter):
            each.grad = torch.ones_like(each)
    return PreparedOptimizer(original, pusher, num_replicas=2)


def gradients(pusher: Pusher, optimizer: optim.Optimizer) -> list[list[float | None]]:
    """The sum of each gradient on each replica."""
    parameters = optimizer.param_groups[0]["params"]
    replicas = zip(*map(pusher.on_each_replica, parameters), strict=True)
    return [[None if each.grad is None else each.grad.sum().item() for each in own] for own in replicas]


@pytest.mark.parametrize(("set_to_none", "first"), [(True, [None, None]), (False, [0.0, 0.0])])
def test_outside_of_replicas_all_gradients_are_forgotten(
    set_to_none: bool, first: list[float | None], of_two: PreparedOptimizer, pusher: Pusher
) -> None:
    of_two.zero_grad(set_to_none=set_to_none)
    assert gradients(pusher, of_two) == [first, [None, None]]


@pytest.mark.parametrize(("set_to_none", "first"), [(True, [None, None]), (False, [0.0, 0.0])])
def test_on_a_replica_its_own_gradients_are_forgotten(
    set_to_none: bool, first: list[float | None], of_two: PreparedOptimizer, pusher: Pusher
) -> None:
    strategy = ps.CentralStorageStrategy(["cpu:0"])
    strategy.run(lambda: of_two.zero_grad(set_to_none=set_to_none))
    assert gradients(pusher, of_two) == [first, [4.0, 2.0]]


def test_a_step_of_two_replicas_is_one_push(of_two: PreparedOptimizer, pusher: Pusher) -> None:
    """U09."""
    strategy = ps.CentralStorageStrategy(["cpu:0", "cpu:1"])
    strategy.run(of_two.step)
    assert (pusher.count, of_two.last_push) == (1, PushResult(1, 0))


def test_a_step_of_two_replicas_outside_of_them_is_refused(of_two: PreparedOptimizer, pusher: Pusher) -> None:
    """U10."""
    with pytest.raises(RuntimeError, match=r"optimizer\.step: this worker has 2 replicas"):
        of_two.step()
    with ps.CentralStorageStrategy(["cpu:0", "cpu:1"]).scope(), pytest.raises(RuntimeError, match="2 replicas"):
        of_two.step()
    assert pusher.count == 0


# --- what may be prepared


class Remote:
    """Holds state as the parameter servers do."""

    def __init__(self) -> None:
        self.held: dict[torch.Tensor, dict[str, Any]] = {}

    def is_there(self) -> bool:
        return bool(self.held)

    def read(self) -> dict[torch.Tensor, dict[str, Any]]:
        return self.held

    def write(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        if any("strange" in slots for slots in state.values()):
            raise ConfigError("strange")
        self.held = {parameter: dict(slots) for parameter, slots in state.items()}


def test_state_is_gathered_and_brought_back(original: optim.Optimizer, pusher: Pusher) -> None:
    remote = Remote()
    prepared = PreparedOptimizer(original, pusher, remote=remote)
    weight = original.param_groups[0]["params"][0]
    remote.held = {weight: {"momentum_buffer": torch.ones(2, 2)}}
    saved = copy.deepcopy(prepared.state_dict())
    assert torch.equal(saved["state"][0]["momentum_buffer"], torch.ones(2, 2))
    assert len(prepared.state) == 0
    remote.held = {}
    saved["param_groups"][0]["lr"] = 0.5
    prepared.load_state_dict(saved)
    assert torch.equal(remote.held[weight]["momentum_buffer"], torch.ones(2, 2))
    assert len(prepared.state) == 0
    assert original.param_groups[0]["lr"] == 0.5


def test_state_that_is_refused_changes_no_settings(original: optim.Optimizer, pusher: Pusher) -> None:
    prepared = PreparedOptimizer(original, pusher, remote=Remote())
    group = original.param_groups[0]
    saved = copy.deepcopy(prepared.state_dict())
    saved["param_groups"][0] |= {"lr": 0.5, "more": 1}
    with pytest.raises(ConfigError, match="strange"):
        prepared.load_state_dict({**saved, "state": {0: {"strange": torch.ones(2, 2)}}})
    assert prepared.param_groups[0] is group
    assert group["lr"] == 0.1
    assert "more" not in group


@pytest.mark.parametrize("rule", [optim.SGD, optim.Adagrad, optim.Adam])
def test_only_an_optimizer_that_has_made_steps_carries_state(rule: Callable[..., optim.Optimizer]) -> None:
    optimizer = rule(nn.Linear(2, 2).parameters(), lr=0.1)
    assert carried(optimizer) == {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
        group["momentum"] = 0.9
    optimizer.step()
    assert list(carried(optimizer)) == optimizer.param_groups[0]["params"]


def test_prepare_leaves_no_second_state_in_the_given_optimizer() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    _, prepared = ps.ParameterServerStrategy().prepare(model, optimizer)
    assert not optimizer.state
    assert prepared.state_dict()["state"][1]["step"] == 1


def test_the_state_of_the_given_optimizer_is_not_asked_for_in_vain(
    prepared: PreparedOptimizer, original: optim.Optimizer
) -> None:
    assert "state" in prepared.state_dict()
    for call in (original.state_dict, lambda: original.load_state_dict({"state": {}, "param_groups": []})):
        with pytest.raises(
            ConfigError, match="SGD: this optimizer was given to prepare.* the one that prepare returned"
        ):
            call()
