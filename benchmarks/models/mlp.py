"""Multilayer perceptrons: *small*, *large*, *idle*."""

from __future__ import annotations

import itertools

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.model import Batch
from benchmarks.models.shapes import BATCHES, MlpShape


class Mlp(msgspec.Struct, frozen=True, tag=True):
    """A `MlpShape` in PyTorch; its batches are ``features [batch, inputs], labels [batch]``."""

    shape: MlpShape

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return layers(self.shape.sizes)

    def batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        inputs, outputs, batch = self.shape.sizes[0], self.shape.sizes[-1], self.shape.batch
        return [
            (torch.randn(batch, inputs, generator=generator), torch.randint(outputs, (batch,), generator=generator))
            for _ in range(BATCHES)
        ]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=self.shape.learning_rate)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels)


def layers(sizes: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers between so many features, with ReLU between them."""
    found: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        found += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*found[:-1])
