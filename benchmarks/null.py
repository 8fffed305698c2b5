"""``python -m benchmarks.null``: a step without any compute, beside the same step of plain PyTorch.

The gradients are there; a step is ``optimizer.step()`` through the public API and nothing else: one worker pushes them
to one ps, which applies SGD, and pulls what comes of it. Beside it a process of plain PyTorch takes the same step in
its own memory. What the two differ by is what a step pays for having its variables elsewhere. Each task has one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.figure import Effort, Figure, compared, run, take_turns
from benchmarks.processes import crew
from benchmarks.serving import ONE_THREAD, start_servers
from benchmarks.stepper import Spec, slowest_step, start, steps_per_second
from paramserver.cluster.environment import LANES

SIZES = (4, 1_000_000, 100_000_000)
FEW = (4, 100_000_000)
NAMES = {"auto": "shared memory", "tcp": "TCP"}


def measure(effort: Effort) -> Iterator[Figure]:
    """The null step of each size on each lane. Blocks for about 10 s for each of them."""
    for nbytes in effort.pick(SIZES, FEW):
        yield from _measure(nbytes, effort)


def _measure(nbytes: int, effort: Effort) -> Iterator[Figure]:
    spec = Spec(nbytes=nbytes)
    with crew() as its_crew:
        workers = {
            lane: start(its_crew, f"the worker on {lane}", spec, start_servers(its_crew).env("chief:0", lane))
            for lane in LANES
        }
        plain = start(its_crew, "plain PyTorch", spec, ONE_THREAD)
        step_seconds = slowest_step([*workers.values(), plain])
        for lane, worker in workers.items():
            ours, other = (partial(steps_per_second, [side], effort.seconds, step_seconds) for side in (worker, plain))
            yield compared(
                take_turns(ours, other, effort.repeats),
                "null",
                f"null step, {NAMES[lane]}",
                size=nbytes,
                size_unit="B",
                beside="plain PyTorch",
                unit="steps/s",
                better="more",
            )


if __name__ == "__main__":
    run(measure, "A step without compute, beside the same step of plain PyTorch.")
