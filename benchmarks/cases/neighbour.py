"""A step without any compute, with two threads in each task, while another process keeps a core busy.

Beside the same with one thread in each task: more threads must not make a task slower because it has to share a core.
One worker and one ps, in shared memory.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_training
from benchmarks.harness.crew import crew
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.options import Options
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.window import sides, slowest_step
from benchmarks.models.null import Parameters

NBYTES = 100_000_000
LEAST = 0.9


def measure(options: Options) -> Iterator[Figure]:
    """Measure beside a busy neighbour, and alone. Blocks for about a minute."""
    for count in (1, 0):
        yield _measure(options, count)


def _measure(options: Options, neighbours: int) -> Figure:
    job = Job(model=Parameters(nbytes=NBYTES))
    with crew() as its_crew:
        clusters = {
            count: start_training(its_crew, job, workers=1, ps=1, lane="auto", threads=count) for count in (2, 1)
        }
        workers = {count: cluster.workers for count, cluster in clusters.items()}
        step_seconds = slowest_step([*workers[2], *workers[1]])
        with contextlib.ExitStack() as stack:
            for _ in range(neighbours):
                stack.enter_context(_busy())
            two, one = sides(options, step_seconds, workers[2], workers[1])
            return Subject(
                case=f"null step with two threads, {neighbours or 'no'} busy neighbour",
                size=NBYTES,
                size_unit="B",
                beside="one thread",
                target=LEAST if neighbours else None,
            ).measure(two, one, options.repeats)


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    """Keep a core busy for a block."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


CASE = Case(
    title="Beside a busy neighbour",
    options=Options,
    measure=measure,
    is_in_suite=False,
)
