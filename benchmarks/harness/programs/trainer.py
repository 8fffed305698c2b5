"""``python -m benchmarks.harness.programs.trainer JOB``: a participant that trains a model.

It trains through the public API as the task that TF_CONFIG names, or with plain PyTorch where there is no TF_CONFIG.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

import msgspec
import torch
from torch import nn

import paramserver as ps
from benchmarks.harness.participant import take_part
from benchmarks.models.catalogue import AnyModel
from benchmarks.models.model import Training
from benchmarks.models.null import Parameters, set_gradients
from paramserver.distribute.bound.optimizer import PreparedOptimizer

START_LIMIT = 120.0


class Job(msgspec.Struct, kw_only=True, frozen=True):
    """The task of a trainer.

    Attributes:
        model: The model.
        device: A GPU that it is trained on; "" for the CPU.
        pipeline: Whether a step does not wait for its own values.
    """

    model: AnyModel
    device: str = ""
    pipeline: bool = False

    def to_argument(self) -> str:
        """Return the job as an argument of a command line."""
        return msgspec.json.encode(self).decode()


def main(job: Job, strategy: ps.ParameterServerStrategy | None) -> None:
    """Train until the input ends."""
    with strategy.scope() if strategy else contextlib.nullcontext():
        module = job.model.build().to(job.device or "cpu")
        optimizer = job.model.optimizer(module)
        if strategy:
            module, optimizer = strategy.prepare(module, optimizer)
    train, loss = _training(job, module, optimizer)

    def step() -> int:
        train()
        last = optimizer.last_push if isinstance(optimizer, PreparedOptimizer) else None
        return last.staleness if last else 0

    def store_bytes() -> int:
        statuses = strategy.client.status() if strategy and strategy.client else []
        return sum(status.values_bytes + status.slots_bytes for status in statuses)

    take_part(step, loss, store_bytes)
    if strategy:
        strategy.close()


def make_strategy(job: Job) -> ps.ParameterServerStrategy:
    """Return the strategy of the task that TF_CONFIG names. Blocks until the ps tasks are up."""
    return ps.ParameterServerStrategy(
        compute_devices=[job.device] if job.device else None,
        pipeline=job.pipeline,
        session_creation_timeout=START_LIMIT,
    )


def _training(
    job: Job, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Callable[[], object], Callable[[], float]]:
    """Return a function that takes a step, and one that returns the loss of the last."""
    if isinstance(job.model, Parameters):
        set_gradients(module)
        return optimizer.step, float
    training = Training(job.model, module, optimizer, job.device or "cpu")

    def train_on_gpu() -> None:
        training.step()
        torch.cuda.synchronize(job.device)  # a step is over when the GPU has done it

    return train_on_gpu if job.device.startswith("cuda") else training.step, lambda: training.loss


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[1], type=Job)
    try:
        main(given, make_strategy(given) if "TF_CONFIG" in os.environ else None)
    except ps.errors.ParameterServerError as error:
        sys.exit(f"error: {error}")
