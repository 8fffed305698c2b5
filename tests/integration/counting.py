"""A worker whose model counts: each step takes 1 from every parameter, and each forward adds 1 to the buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.testing import LocalCluster


class CountingModel(nn.Module):
    """Starts at zero.

    Args:
        dense: Dense parameters by name; a linear layer gets a direct gradient.
    """

    def __init__(self, **dense: nn.Parameter | nn.Linear) -> None:
        super().__init__()
        for name, each in dense.items():
            setattr(self, name, each)
        self._names = tuple(dense)
        self.table = nn.Embedding(8, 4, sparse=True)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("total", torch.zeros(3))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self) -> Tensor:
        self.count += 1
        self.total += 1
        each = (getattr(self, name) for name in self._names)
        dense = [part(torch.ones(part.in_features)) if isinstance(part, nn.Linear) else part for part in each]
        return sum((part.sum() for part in dense), start=self.table(torch.arange(8)).sum())


class CountingTrainer:
    """The only worker of a cluster."""

    def __init__(self, cluster: LocalCluster, model: CountingModel, *, pipeline: bool = False) -> None:
        self.strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"), pipeline=pipeline)
        self.model, self.optimizer = self.strategy.prepare(model, optim.SGD(model.parameters(), lr=1.0))
        self.forwards = 0

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.forwards += 1
        self.model().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def check_values(self, updates: int, where: str = "") -> None:
        """Check that so many updates were made, each once and whole, and that no forward's buffers are lost."""
        self.strategy.refresh()
        for name, value in self.model.state_dict().items():
            expected = self.forwards if name in ("count", "total") else -updates
            assert (value == expected).all(), f"{name} is {value.unique().tolist()}, not {expected}: {where}"
