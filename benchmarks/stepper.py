"""``python -m benchmarks.stepper SPEC``: a participant whose steps are those of one `Spec`, ours or plain PyTorch's.

It trains with parameter servers as the task that TF_CONFIG names, or with plain PyTorch where there is none.
"""

from __future__ import annotations

import inspect
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn

import paramserver as ps
from benchmarks.models import Batch, Mlp, Model, Training
from benchmarks.participant import take_part
from benchmarks.processes import Child, Crew
from benchmarks.shapes import LEARNING_RATE, MlpShape
from benchmarks.step import await_ready, rate, run_window
from paramserver.distribute.bound.optimizer import PreparedOptimizer

START_LIMIT = 60.0
COMPUTING = Mlp(MlpShape(sizes=(784, 512, 10), batch=512))
"""What a step computes that computes: about 20 ms with one thread, and 1.6 MB of values."""

WIDTH = 64
LOOK_UPS = 1024
"""How many batches of row ids there are: more rows than caches hold pages of."""


class Spec(msgspec.Struct, kw_only=True, frozen=True):
    """What a step is.

    Attributes:
        variables: How many parameters share the bytes. Their gradients are there; a step is the optimizer's alone.
        nbytes: Of all parameters together, float32.
        computes: Whether a step is a whole one of `COMPUTING` instead.
        rows: How many random rows of a table of ``nbytes`` a step looks up, and updates, instead; 0 if it does not.
        pipeline: Whether it does not wait for its own values.
    """

    variables: int = 1
    nbytes: int = 4
    computes: bool = False
    rows: int = 0
    pipeline: bool = False


@dataclass(frozen=True)
class Rows:
    """A `Model` that looks up ``count`` rows of a table of ``nbytes``, and adds them up; its batches have no labels."""

    count: int
    nbytes: int

    def build(self) -> nn.Module:
        """A table of zeros, which take no memory until they are written."""
        # torch writes its own zeros, and those of NumPy are in huge pages, which take a second to be written all.
        memory = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        zeros = torch.frombuffer(memory, dtype=torch.float32).view(-1, WIDTH)
        table: nn.Module = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            zeros, freeze=False, sparse=True
        )
        return table

    def batches(self) -> list[Batch]:
        """Random ids ``[count]``, the same every time."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.nbytes // 4 // WIDTH, (LOOK_UPS, self.count), generator=generator)
        return [(batch, batch) for batch in ids]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """SGD."""
        return sgd(module)

    def loss(self, outputs: Tensor, _: Tensor) -> Tensor:
        """The sum of the rows."""
        return outputs.sum()


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
    model: Model | None = COMPUTING if spec.computes else Rows(spec.rows, spec.nbytes) if spec.rows else None
    module = model.build() if model else _parameters(spec)
    optimizer = model.optimizer(module) if model else sgd(module)
    if is_distributed:
        options = {"pipeline": True} if spec.pipeline else {}
        strategy = ps.ParameterServerStrategy(session_creation_timeout=START_LIMIT, **options)  # type: ignore[arg-type]  # there is no other option
        with strategy.scope():
            module, optimizer = strategy.prepare(module, optimizer)
    training = Training(model, module, optimizer) if model else None
    if not training:
        sum(parameter.sum() for parameter in module.parameters()).backward()  # type: ignore[union-attr]  # a tensor

    def step() -> int:
        training.step() if training else optimizer.step()
        last = optimizer.last_push if isinstance(optimizer, PreparedOptimizer) else None
        return last.staleness if last else 0

    take_part(step, lambda: training.loss if training else 0.0, lambda: 0)
    if is_distributed:
        strategy.close()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """The rule of all steps."""
    return torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)


def _parameters(spec: Spec) -> nn.Module:
    sizes = spec.nbytes // 4 // spec.variables
    return nn.ParameterList(nn.Parameter(torch.zeros(sizes)) for _ in range(spec.variables))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Spec), "TF_CONFIG" in os.environ)
