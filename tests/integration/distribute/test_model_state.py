"""A5: a prepared model is written down as a plain one is, whole or in parts, by whoever looks at its storage."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.testing.local_cluster import LocalCluster

Prepare = Callable[[nn.Module, optim.Optimizer], tuple[Any, Any]]


class Net(nn.Module):
    """Two large layers, small parts, a tied weight, buffers of two dtypes."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(100, 200)
        self.norm = nn.BatchNorm1d(200)
        self.head = nn.Linear(200, 3)
        self.other = nn.Linear(200, 3)
        self.other.weight = self.head.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.rough = nn.Parameter(torch.randn(5).bfloat16(), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.body(x))
        loss: Tensor = ((self.head(hidden) + self.other(hidden)) * self.scale).square().mean()
        return loss


@pytest.fixture(params=["in process", "auto", "tcp", "pipelined", "replicas"])
def prepare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepare]:
    if request.param == "in process":
        yield ps.ParameterServerStrategy().prepare
    elif request.param == "replicas":
        yield ps.CentralStorageStrategy(["cpu:0", "cpu:1"]).prepare
    else:
        monkeypatch.setenv("PARAMSERVER_LANE", "tcp" if request.param == "tcp" else "auto")
        with LocalCluster(ps=2, workers=1) as cluster:
            pipeline = request.param == "pipelined"
            strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"), pipeline=pipeline)
            yield strategy.prepare
            strategy.close()


@pytest.fixture
def net(prepare: Prepare) -> Net:
    net = Net()
    prepared, _ = prepare(net, optim.SGD(net.parameters(), lr=0.1))
    assert prepared is net
    return net


def test_safetensors_save_and_load_a_model(net: Net, tmp_path: Path) -> None:
    safetensors.torch.save_model(net, str(tmp_path / "model.safetensors"))
    plain = Net(seed=2)
    safetensors.torch.load_model(plain, tmp_path / "model.safetensors")
    torch.testing.assert_close(plain.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_safetensors_load_into_a_prepared_model(net: Net, tmp_path: Path) -> None:
    plain = Net(seed=2)
    safetensors.torch.save_model(plain, str(tmp_path / "model.safetensors"))
    safetensors.torch.load_model(net, tmp_path / "model.safetensors")
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_part_takes_its_own_bytes(net: Net) -> None:
    def written(state: Any) -> int:
        file = io.BytesIO()
        torch.save(state, file)
        return len(file.getvalue())

    plain = Net()
    assert written(net.head.state_dict()) == written(plain.head.state_dict())
    assert written(dict(net.norm.named_buffers())) == written(dict(plain.norm.named_buffers()))
    assert written(list(net.head.parameters())) == written(list(plain.head.parameters()))


def test_each_tensor_has_a_storage_of_its_own(net: Net) -> None:
    storages = {}
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        storages[tensor.untyped_storage().data_ptr()] = name
    assert len(storages) == len([*net.parameters(), *net.buffers()])


def test_a_state_dict_is_the_memory_of_the_model(net: Net) -> None:
    """As with a plain module: an average of weights is kept up by writing into it."""
    average = copy.deepcopy(net)
    for mean, value in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        mean.copy_(value.logical_not() if value.dtype is torch.bool else value * 2)
    torch.testing.assert_close(average.body.weight.detach(), 2 * net.body.weight.detach())
    torch.testing.assert_close(average.norm.running_var, 2 * net.norm.running_var)
    assert net.state_dict()["body.weight"].data_ptr() == net.body.weight.data_ptr()


def test_steps_change_what_it_was_bound_to(prepare: Prepare) -> None:
    net = Net()
    net, optimizer = prepare(net, optim.SGD(net.parameters(), lr=0.1))
    state = net.state_dict()
    before = copy.deepcopy(state)
    if isinstance(optimizer, optim.Optimizer) and optimizer._num_replicas == 1:
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(8, 100)).backward()
            optimizer.step()
        assert not torch.equal(state["body.weight"], before["body.weight"])
        assert not torch.equal(state["norm.running_mean"], before["norm.running_mean"])
