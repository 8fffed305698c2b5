"""Training through the public API, beside plain PyTorch.

Each of the models with 1, 2 and 4 workers, with 1 and 2 ps tasks, on each lane; one thread for each task. Steps are
those of all workers together. Beside them stands plain PyTorch in one process with as many threads as there are
workers, at most one for each core. The case `step` measures one such combination for longer, and its memory.

Workers that are not counted wait, connected, for the next turn.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_plain, start_training
from benchmarks.harness.crew import Crew, crew
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.options import LANE_NAMES, LANES, Effort
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.window import sides, slowest_step
from benchmarks.models.catalogue import MODELS

WORKERS = (1, 2, 4)
FEW_WORKERS = (2,)
PS = (1, 2)
MOST_TURNS = 3
"""The largest number of turns, because there are many combinations."""


def measure(options: Effort) -> Iterator[Figure]:
    """Measure all models, lanes and numbers of tasks. Blocks for about four minutes."""
    for model, lane, ps in itertools.product(
        options.pick(tuple(MODELS), tuple(MODELS)), LANES, options.pick(PS, PS[:1])
    ):
        with crew() as its_crew:
            yield from _measure(its_crew, model, lane, ps, options)


def _measure(its_crew: Crew, model: str, lane: str, ps: int, options: Effort) -> Iterator[Figure]:
    counts = options.pick(WORKERS, FEW_WORKERS)
    job = Job(model=MODELS[model])
    cluster = start_training(its_crew, job, workers=counts[-1], ps=ps, lane=lane, threads=1)
    step_seconds = slowest_step(cluster.workers)
    plain = {threads: start_plain(its_crew, job, threads) for threads in sorted(set(map(_threads, counts)))}
    step_seconds = max(step_seconds, slowest_step(list(plain.values())))
    for count in counts:
        ours, other = sides(options, step_seconds, cluster.workers[:count], [plain[_threads(count)]])
        yield Subject(
            case=f"{model}, {LANE_NAMES[lane]}, {ps} ps",
            size=count,
            size_unit="workers",
            beside=f"plain PyTorch, threads: {_threads(count)}",
        ).measure(ours, other, min(options.repeats, MOST_TURNS))
    for child in plain.values():
        child.dismiss()
    cluster.end()


def _threads(workers: int) -> int:
    return min(workers, os.cpu_count() or 1)


CASE = Case(title="Training", options=Effort, measure=measure, order=30)
