"""``python -m benchmarks.stepper SPEC``: a participant whose steps are those of one `Spec`, ours or plain PyTorch's.

It trains with parameter servers as the task that TF_CONFIG names, or with plain PyTorch where there is none.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import nn

import paramserver as ps
from benchmarks.models import Mlp, Training, plain_optimizer
from benchmarks.participant import take_part
from benchmarks.processes import Child, Crew
from benchmarks.step import await_ready, rate, run_window
from paramserver.distribute.prepared_optimizer import PreparedOptimizer

START_LIMIT = 60.0
COMPUTING = Mlp(sizes=(784, 512, 10), batch=512)
"""What a step computes that computes: about 20 ms with one thread, and 1.6 MB of values."""


class Spec(msgspec.Struct, kw_only=True, frozen=True):
    """What a step is.

    Attributes:
        variables: How many parameters share the bytes. Their gradients are there; a step is the optimizer's alone.
        nbytes: Of all parameters together, float32.
        computes: Whether a step is a whole one of `COMPUTING` instead.
        pipeline: Whether it does not wait for its own values.
    """

    variables: int = 1
    nbytes: int = 4
    computes: bool = False
    pipeline: bool = False


def start(crew: Crew, name: str, spec: Spec, env: Mapping[str, str]) -> Child:
    """Start a participant."""
    return crew.start_module(name, "benchmarks.stepper", msgspec.json.encode(spec).decode(), env)


def can_pipeline() -> bool:
    """Whether strategies can do without waiting for their own values."""
    return "pipeline" in inspect.signature(ps.ParameterServerStrategy).parameters


def slowest_step(children: Sequence[Child]) -> float:
    """Wait until all participants are warm; the seconds that the slowest one's step takes."""
    return max(ready.step_seconds for ready in await_ready(children))


def steps_per_second(children: Sequence[Child], seconds: float, step_seconds: float) -> float:
    """Have participants work at the same time for ``seconds``; the steps of all of them in a second."""
    return rate(run_window(children, seconds, step_seconds))


def main(spec: Spec, is_distributed: bool) -> None:
    """Take steps until the input ends."""
    model: nn.Module = COMPUTING.build() if spec.computes else _parameters(spec)
    optimizer = plain_optimizer(model)
    if is_distributed:
        options = {"pipeline": True} if spec.pipeline else {}
        strategy = ps.ParameterServerStrategy(session_creation_timeout=START_LIMIT, **options)  # type: ignore[arg-type]  # there is no other option
        with strategy.scope():
            model, optimizer = strategy.prepare(model, optimizer)
    training = Training(model, optimizer, COMPUTING.batches() if spec.computes else [])
    if not spec.computes:
        sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]  # a tensor

    def step() -> int:
        training.step() if spec.computes else optimizer.step()
        last = optimizer.last_push if isinstance(optimizer, PreparedOptimizer) else None
        return last.staleness if last else 0

    take_part(step, lambda: training.loss, lambda: 0)
    if is_distributed:
        strategy.close()


def _parameters(spec: Spec) -> nn.Module:
    sizes = spec.nbytes // 4 // spec.variables
    return nn.ParameterList(nn.Parameter(torch.zeros(sizes)) for _ in range(spec.variables))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Spec), "TF_CONFIG" in os.environ)
