"""``python -m benchmarks.training``: training through the public API, beside plain PyTorch.

Each of the models with 1, 2 and 4 workers, with 1 and 2 ps tasks, on each lane; one thread for each task. Steps are
those of all workers together. Beside them stands plain PyTorch in one process with as many threads as there are
workers, at most one for each core. ``benchmarks.step`` measures one such case for longer, and its memory.

Workers that are not counted wait, connected, for the next turn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from benchmarks.figure import Effort, Figure, compared, run, take_turns
from benchmarks.models import LANE_NAMES, LANES, MODELS
from benchmarks.processes import Child, Cluster, Crew, crew
from benchmarks.stepper import slowest_step, steps_per_second

WORKERS = (1, 2, 4)
FEW_WORKERS = (2,)
PS = (1, 2)
MOST_TURNS = 3
"""There are many cases."""


class Case(NamedTuple):
    """What is trained, and by which tasks beside the workers."""

    model: str
    lane: str
    ps: int


def measure(effort: Effort) -> Iterator[Figure]:
    """All models, lanes and numbers of tasks. Blocks for about four minutes."""
    for model in effort.pick(tuple(MODELS), tuple(MODELS)):
        for lane in LANES:
            for ps in effort.pick(PS, PS[:1]):
                with crew() as its_crew:
                    yield from _measure(its_crew, Case(model, lane, ps), effort)


def _measure(its_crew: Crew, case: Case, effort: Effort) -> Iterator[Figure]:
    counts = effort.pick(WORKERS, FEW_WORKERS)
    cluster = its_crew.start_cluster(case.model, workers=counts[-1], ps=case.ps, lane=case.lane, threads=1)
    step_seconds = slowest_step(cluster.workers)
    plain = {threads: its_crew.start_plain(case.model, threads) for threads in sorted(set(map(_threads, counts)))}
    plain_seconds = slowest_step(list(plain.values()))
    for count in counts:
        ours = partial(steps_per_second, cluster.workers[:count], effort.seconds, step_seconds)
        other = partial(steps_per_second, [plain[_threads(count)]], effort.seconds, plain_seconds)
        yield compared(
            take_turns(ours, other, min(effort.repeats, MOST_TURNS)),
            "training",
            f"{case.model}, {LANE_NAMES[case.lane]}, {case.ps} ps",
            size=count,
            size_unit="workers",
            beside=f"plain PyTorch, threads: {_threads(count)}",
            unit="steps/s",
            better="more",
        )
    _end(cluster, list(plain.values()))


def _threads(workers: int) -> int:
    return min(workers, os.cpu_count() or 1)


def _end(cluster: Cluster, plain: list[Child]) -> None:
    for child in plain:
        child.dismiss()
    cluster.end()


if __name__ == "__main__":
    run(measure, "Training, beside plain PyTorch.")
