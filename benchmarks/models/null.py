"""Models of steps that compute next to nothing, of any size."""

from __future__ import annotations

import mmap

import msgspec
import torch
from torch import Tensor, nn

from benchmarks.models.model import Batch
from benchmarks.models.shapes import LEARNING_RATE

WIDTH = 64
LOOK_UPS = 1024
"""Number of batches of row ids: they name more rows than caches hold pages of."""


class Rows(msgspec.Struct, kw_only=True, frozen=True, tag=True):
    """A table of ``nbytes``, of which a step looks up ``count`` rows and adds them up; its batches have no labels."""

    count: int
    nbytes: int

    def build(self) -> nn.Module:
        # torch writes its own zeros, and those of NumPy are in huge pages, which take a second to be written all.
        memory = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        zeros = torch.frombuffer(memory, dtype=torch.float32).view(-1, WIDTH)
        table: nn.Module = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            zeros, freeze=False, sparse=True
        )
        return table

    def batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.nbytes // 4 // WIDTH, (LOOK_UPS, self.count), generator=generator)
        return [(batch, batch) for batch in ids]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def loss(self, outputs: Tensor, _: Tensor) -> Tensor:
        return outputs.sum()


class Parameters(msgspec.Struct, kw_only=True, frozen=True, tag=True):
    """So many variables of ``nbytes`` together, float32, which have their gradients; there are no batches."""

    nbytes: int
    variables: int = 1

    def build(self) -> nn.Module:
        size = self.nbytes // 4 // self.variables
        return nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(self.variables))

    def batches(self) -> list[Batch]:
        return []

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def loss(self, outputs: Tensor, _: Tensor) -> Tensor:
        return outputs


def set_gradients(module: nn.Module) -> None:
    """Give each parameter a gradient of ones."""
    sum(parameter.sum() for parameter in module.parameters()).backward()  # type: ignore[union-attr]  # a tensor
