"""The contract of a model, and its training step, the same in all processes."""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
"""The arguments of a module, and the labels as the last."""


class Model(Protocol):
    """A model and its way to be trained: a frozen struct, which processes send each other."""

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""

    def build(self) -> nn.Module:
        """Return the module, with the same initial values every time."""

    def batches(self) -> list[Batch]:
        """Return random batches, the same every time."""

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer that a user of plain PyTorch would make."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss ``[]`` of the module's outputs for a batch, its mean."""


class Training:
    """A model in training, batch after batch.

    Args:
        model: What is trained.
        module: The module that it built, prepared or plain.
        optimizer: The optimizer that it made, prepared or plain.
        device: Holds the module, and gets the batches.
    """

    def __init__(
        self, model: Model, module: nn.Module, optimizer: torch.optim.Optimizer, device: str | torch.device = "cpu"
    ) -> None:
        warm_kernels()
        self._model = model
        self._module = module
        self._optimizer = optimizer
        self._batches = itertools.cycle([tuple(each.to(device) for each in batch) for batch in model.batches()])
        self._loss = torch.zeros(())

    def step(self) -> None:
        """Take a step, written as any PyTorch program writes it."""
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
