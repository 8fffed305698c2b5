"""The same training step over a network with a delay.

One worker trains with one ps by TCP, through a proxy in this process (see `benchmarks.harness.proxy`) that adds 1, 5
and 20 ms to every round trip, half of them on each way; beside it the same two tasks through the same proxy without a
delay. A step computes for about 20 ms and moves 1.6 MB each way. Each task has one thread. A step that does not wait
for its own values (``pipeline=True``) is measured as well.

The proxy stands in for network namespaces with a delaying queue (netem), which many kernels lack.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_cluster, start_trainer
from benchmarks.harness.crew import Child, crew
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.options import Effort
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.proxy import Proxy
from benchmarks.harness.window import slowest_step, steps_per_second
from benchmarks.models.mlp import Mlp
from benchmarks.models.shapes import MlpShape

MODEL = Mlp(MlpShape(sizes=(784, 512, 10), batch=512))
MILLISECONDS = (1, 5, 20)
JUDGED = 5
LEAST_OF_PIPELINE = 0.85
LONGER = 2
"""Factor by which turns are longer than those of other cases, because steps are."""


def measure(options: Effort) -> Iterator[Figure]:
    """Measure both kinds of steps with each delay. Blocks for about a minute for each kind."""
    for pipeline in (False, True):
        with Proxy() as proxy, crew() as its_crew:
            cluster = start_cluster(its_crew, address=proxy.toward)
            job = Job(model=MODEL, pipeline=pipeline)
            worker = start_trainer(its_crew, "the worker", job, cluster.env("chief:0", "tcp"))
            yield from _measure(worker, proxy, pipeline, options)


def _measure(worker: Child, proxy: Proxy, pipeline: bool, options: Effort) -> Iterator[Figure]:
    step_seconds = slowest_step([worker])

    def rate(delay: float) -> float:
        proxy.delay = delay / 2
        return steps_per_second([worker], LONGER * options.seconds, step_seconds + delay)

    for milliseconds in options.pick(MILLISECONDS, (JUDGED,)):
        yield Subject(
            case="pipelined step" if pipeline else "step",
            size=milliseconds,
            size_unit="ms",
            beside="0 ms",
            target=LEAST_OF_PIPELINE if pipeline and milliseconds == JUDGED else None,
        ).measure(partial(rate, milliseconds / 1000), partial(rate, 0.0), options.repeats)


CASE = Case(title="A connection that takes its time", options=Effort, measure=measure, order=50)
