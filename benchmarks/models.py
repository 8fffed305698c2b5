"""The models that are measured, and the one training step that all processes run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.shapes import BATCHES, CLASSES, MLPS, SPARSES, MlpShape, SparseShape

Batch = tuple[Tensor, ...]
"""What the module is called with, and the labels as the last."""

LANE_NAMES = {"auto": "shared memory", "tcp": "TCP"}
"""What the options of a lane are called in results."""
LANES = tuple(LANE_NAMES)


class Model(Protocol):
    """What is trained, and how."""

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""

    def build(self) -> nn.Module:
        """The module, with the same initial values every time."""

    def batches(self) -> list[Batch]:
        """Random batches, the same every time."""

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """What a user of plain PyTorch would write."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss ``[]`` of what the module returned for a batch, its mean."""


@dataclass(frozen=True)
class Mlp:
    """A `MlpShape` in PyTorch; its batches are ``features [batch, inputs], labels [batch]``."""

    shape: MlpShape

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return self.shape.nbytes

    def build(self) -> nn.Module:
        """The module, with the same initial values every time."""
        torch.manual_seed(0)
        return layers(self.shape.sizes)

    def batches(self) -> list[Batch]:
        """Random batches, the same every time."""
        generator = torch.Generator().manual_seed(1)
        batch = self.shape.batch
        return [
            (
                torch.randn(batch, self.shape.sizes[0], generator=generator),
                torch.randint(self.shape.sizes[-1], (batch,), generator=generator),
            )
            for _ in range(BATCHES)
        ]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(module.parameters(), lr=self.shape.learning_rate)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy."""
        return functional.cross_entropy(outputs, labels)


class Clicks(nn.Module):
    """The module of a `SparseShape`: a table whose gradient is sparse, and a perceptron."""

    def __init__(self, shape: SparseShape) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.rows, shape.width, sparse=True)
        self.perceptron = layers(shape.sizes)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """The logits ``[batch]`` of ``ids [batch, ids]`` and ``numbers [batch, numbers]``."""
        logits: Tensor = self.perceptron(torch.cat((self.table(ids).flatten(1), numbers), dim=1))
        return logits.squeeze(1)


@dataclass(frozen=True)
class Sparse:
    """A `SparseShape` in PyTorch; its batches are ``ids [batch, ids], numbers [batch, numbers], labels [batch]``."""

    shape: SparseShape

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters, the table's included."""
        return self.shape.nbytes

    def build(self) -> nn.Module:
        """The module, with the same initial values every time."""
        torch.manual_seed(0)
        return Clicks(self.shape)

    def batches(self) -> list[Batch]:
        """Random batches, the same every time."""
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
        """Adagrad, for the table and for the rest."""
        return torch.optim.Adagrad(module.parameters(), lr=self.shape.learning_rate)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The binary cross entropy."""
        return functional.binary_cross_entropy_with_logits(outputs, labels)


def layers(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers between so many features, and ReLU between them."""
    found: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        found += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*found[:-1])


MODELS: dict[str, Model] = {
    **{name: Mlp(shape) for name, shape in MLPS.items()},
    **{name: Sparse(shape) for name, shape in SPARSES.items()},
}

IDLE = "idle"
"""The name of the model of a process that is there but has next to nothing to hold: the zero of memory."""

ALL_MODELS: dict[str, Model] = {**MODELS, IDLE: Mlp(MlpShape(sizes=(784, 1, CLASSES)))}


class Training:
    """A model at training, batch after batch.

    Args:
        model: What is trained.
        module: What it built, prepared or plain.
        optimizer: Its optimizer, prepared or plain.
    """

    def __init__(self, model: Model, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        warm_kernels()
        self._model = model
        self._module = module
        self._optimizer = optimizer
        self._batches = itertools.cycle(model.batches())
        self._loss = torch.zeros(())

    def step(self) -> None:
        """One step, written as any PyTorch program writes it."""
        *inputs, labels = next(self._batches)
        self._optimizer.zero_grad()
        loss = self._model.loss(self._module(*inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._optimizer.step()
        self._loss = loss.detach()

    @property
    def loss(self) -> float:
        """The loss of the last step."""
        return self._loss.item()


def warm_kernels() -> None:
    """Have torch set up what its matrix products need, so that an idle process holds that, too."""
    torch.ones(256, 784) @ torch.ones(784, 256)
