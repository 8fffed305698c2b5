"""The models that are measured, and the one training step that all processes run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
BATCHES = 16
LEARNING_RATE = 0.01


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A multilayer perceptron with ReLU between its layers.

    Attributes:
        sizes: Features of the input, of each hidden layer, and of the output.
        batch: Examples in a batch.
    """

    sizes: tuple[int, ...]
    batch: int = 32

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters, float32."""
        return 4 * sum(inputs * outputs + outputs for inputs, outputs in itertools.pairwise(self.sizes))

    def build(self) -> nn.Sequential:
        """The module, with the same initial values every time."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(self.sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Random ``(features [batch, inputs], labels [batch])``, `BATCHES` of them."""
        generator = torch.Generator().manual_seed(1)
        return [
            (
                torch.randn(self.batch, self.sizes[0], generator=generator),
                torch.randint(CLASSES, (self.batch,), generator=generator),
            )
            for _ in range(BATCHES)
        ]


MODELS = {
    "small": Mlp(sizes=(784, 128, CLASSES)),
    "large": Mlp(sizes=(784, 4096, 4096, 4096, CLASSES)),
}

IDLE = "idle"
"""The name of the model of a process that is there but has next to nothing to hold: the zero of memory."""

ALL_MODELS = {**MODELS, IDLE: Mlp(sizes=(784, 1, CLASSES))}


class Training:
    """A model at training, batch after batch.

    Args:
        model: The module, prepared or plain.
        optimizer: Its optimizer, prepared or plain.
        batches: What it is trained on, over and over.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
    ) -> None:
        warm_kernels()
        self._model = model
        self._optimizer = optimizer
        self._batches = itertools.cycle(batches)
        self._loss = torch.zeros(())

    def step(self) -> None:
        """One step, written as any PyTorch program writes it."""
        features, labels = next(self._batches)
        self._optimizer.zero_grad()
        loss = functional.cross_entropy(self._model(features), labels)
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


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """What a user of plain PyTorch would write."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
