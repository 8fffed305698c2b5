"""Training on a GPU, with ps tasks in host memory, equals plain PyTorch on it.

The same is trained on the CPU in its place, so that what is compared is known to be right where there is no GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import paramserver as ps
from paramserver.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=needs_gpu)])
lanes = pytest.mark.parametrize("lane", ["auto", "tcp"])

STEPS = 8


class Net(nn.Module):
    """A table, running statistics, and a parameter that spans blocks."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8, sparse=True)
        self.hidden = nn.Linear(8, 70_000)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(70_000, 2)

    def forward(self, ids):
        return self.out(torch.relu(self.hidden(self.norm(self.table(ids)))))


def a_net(device):
    torch.manual_seed(0)
    return Net().to(device)


def optimizers_of(model):
    rest = [parameter for parameter in model.parameters() if parameter is not model.table.weight]
    return [optim.Adagrad([model.table.weight], lr=0.1), optim.SGD(rest, lr=0.01, momentum=0.9)]


def train(model, optimizers, device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(50, (16,), generator=generator).to(device)
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(ids), ids % 2).backward()
        for optimizer in optimizers:
            optimizer.step()


def trained(lane, device, monkeypatch, **options):
    """What a worker on a device has come to."""
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with LocalCluster(ps=2, workers=1, lane=lane) as cluster:
        strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"), compute_devices=[device], **options)
        model = a_net(device)
        model, optimizers = strategy.prepare(model, optimizers_of(model))
        train(model, optimizers, device)
        assert all(parameter.device == torch.device(device) for parameter in model.parameters())
        values = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        strategy.close()
    return values


@lanes
@devices
def test_a_worker_on_a_gpu_trains_as_plain_pytorch_on_it(lane, device, monkeypatch):
    plain = a_net(device)
    train(plain, optimizers_of(plain), device)
    expected = {name: value.cpu() for name, value in plain.state_dict().items()}
    torch.testing.assert_close(trained(lane, device, monkeypatch), expected, rtol=1e-4, atol=1e-5)


@lanes
@needs_gpu
def test_a_pipelined_worker_on_a_gpu_trains_as_one_on_the_cpu(lane, monkeypatch):
    ours, expected = (trained(lane, device, monkeypatch, pipeline=True) for device in ("cuda:0", "cpu"))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
