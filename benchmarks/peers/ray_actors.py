"""Ray's actors as an asynchronous parameter server, as in "Parameter Server" of Ray's documentation.

The driver hands each worker's gradients to the ps as soon as there are some, and the new weights to that worker.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import ray
import torch
from torch.nn import functional

from benchmarks.harness.participant import take_part
from benchmarks.models.catalogue import MODELS
from benchmarks.peers.assignment import Assignment, read_assignment

STORE_BYTES = 4 << 30
"""Size of the store that weights and gradients go through."""


class ParameterServer:
    """Holds the weights."""

    def __init__(self, model: str) -> None:
        self._model = MODELS[model].build()
        self._optimizer = MODELS[model].optimizer(self._model)

    def apply_gradients(self, *gradients: list[Any]) -> dict[str, torch.Tensor]:
        """Take a step with the sum of gradients, and return the weights after it."""
        summed = [np.stack(gradient).sum(axis=0) for gradient in zip(*gradients, strict=True)]
        self._optimizer.zero_grad()
        for parameter, gradient in zip(self._model.parameters(), summed, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return self.get_weights()

    def get_weights(self) -> dict[str, torch.Tensor]:
        """Return the present weights."""
        return self._model.state_dict()


class DataWorker:
    """Computes gradients."""

    def __init__(self, model: str) -> None:
        self._model = MODELS[model].build()
        self._batches = itertools.cycle(MODELS[model].batches())
        self._loss = 0.0

    def compute_gradients(self, weights: dict[str, torch.Tensor]) -> list[Any]:
        """Return the gradients of the next batch, in the order of the parameters."""
        self._model.load_state_dict(weights)
        features, labels = next(self._batches)
        self._model.zero_grad()
        loss = functional.cross_entropy(self._model(features), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._loss = loss.item()
        return [parameter.grad.numpy() for parameter in self._model.parameters() if parameter.grad is not None]

    def loss(self) -> float:
        """Return the loss of the last batch."""
        return self._loss


class Driver:
    """The asynchronous loop."""

    def __init__(self, model: str, workers: int) -> None:
        self._server = ray.remote(ParameterServer).remote(model)
        self._workers = [ray.remote(DataWorker).remote(model) for _ in range(workers)]
        weights = self._server.get_weights.remote()
        self._computing = {worker.compute_gradients.remote(weights): worker for worker in self._workers}

    def step(self) -> int:
        """Apply the next gradients, and have their worker compute others."""
        [gradients], _ = ray.wait(list(self._computing))
        worker = self._computing.pop(gradients)
        weights = self._server.apply_gradients.remote(gradients)
        self._computing[worker.compute_gradients.remote(weights)] = worker
        return 0

    def loss(self) -> float:
        """Return the loss of the last step of one of the workers."""
        return float(ray.get(self._workers[0].loss.remote()))


def main(assignment: Assignment) -> None:
    """Take part until the input ends."""
    ray.init(
        num_cpus=1 + assignment.workers,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=assignment.folder,
    )
    driver = Driver(assignment.model, assignment.workers)
    take_part(driver.step, driver.loss)
    ray.shutdown()


if __name__ == "__main__":
    main(read_assignment())
