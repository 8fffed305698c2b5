"""A model with an embedding table whose gradients are sparse: *sparse*."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.mlp import layers
from benchmarks.models.model import Batch
from benchmarks.models.shapes import BATCHES, SparseShape


class Clicks(nn.Module):
    """The module of a `SparseShape`: a table and a perceptron."""

    def __init__(self, shape: SparseShape) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.rows, shape.width, sparse=True)
        self.perceptron = layers(shape.sizes)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """Return the logits ``[batch]`` of ``ids [batch, ids]`` and ``numbers [batch, numbers]``."""
        logits: Tensor = self.perceptron(torch.cat((self.table(ids).flatten(1), numbers), dim=1))
        return logits.squeeze(1)


class Sparse(msgspec.Struct, frozen=True, tag=True):
    """A `SparseShape` in PyTorch; its batches are ``ids [batch, ids], numbers [batch, numbers], labels [batch]``."""

    shape: SparseShape

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return Clicks(self.shape)

    def batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        shape = self.shape
        return [
            (
                torch.randint(shape.rows, (shape.batch, shape.ids), generator=generator),
                torch.randn(shape.batch, shape.numbers, generator=generator),
                torch.randint(2, (shape.batch,), generator=generator).float(),
            )
            for _ in range(BATCHES)
        ]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(module.parameters(), lr=self.shape.learning_rate)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs, labels)
