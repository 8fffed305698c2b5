"""``python -m benchmarks.gpu``: a step on one GPU with a ps in host memory, beside the same step without a ps.

Each of three models is trained by one worker, with one ps on the same host by shared memory, and beside it by plain
PyTorch on the same GPU. A step is over when the GPU has done it. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import msgspec
import torch

from benchmarks.figure import Effort, Figure, compared, run, take_turns
from benchmarks.gpu_worker import MODELS, Work
from benchmarks.processes import BenchmarkError, crew
from benchmarks.serving import ONE_THREAD, start_servers
from benchmarks.stepper import slowest_step, steps_per_second


def measure(effort: Effort) -> Iterator[Figure]:
    """All models; the least that can be measured is a tiny one on the CPU. Blocks for about two minutes.

    Raises:
        BenchmarkError: If there is no GPU.
    """
    is_tiny = effort.picked == "least"
    if not is_tiny and not torch.cuda.is_available():
        raise BenchmarkError("there is no GPU that torch can use here, and nothing was measured")
    device = "cpu" if is_tiny else "cuda:0"
    for model in effort.pick(tuple(MODELS), tuple(MODELS)):
        yield _measure(Work(model=model, device=device, is_tiny=is_tiny), effort)


def _measure(work: Work, effort: Effort) -> Figure:
    module, argument = "benchmarks.gpu_worker", msgspec.json.encode(work).decode()
    with crew() as its_crew:
        env = start_servers(its_crew).env("chief:0", "auto")
        worker = its_crew.start_module("the worker", module, argument, env)
        plain = its_crew.start_module("plain PyTorch", module, argument, ONE_THREAD)
        step_seconds = slowest_step([worker, plain])
        ours, other = (partial(steps_per_second, [side], effort.seconds, step_seconds) for side in (worker, plain))
        return compared(
            take_turns(ours, other, effort.repeats),
            "gpu",
            f"{work.model}, {_name(work.device)}",
            size=1,
            size_unit="GPU",
            beside="plain PyTorch",
            unit="steps/s",
            better="more",
        )


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU in its place"


if __name__ == "__main__":
    run(measure, "Training on one GPU, beside plain PyTorch on it.")
