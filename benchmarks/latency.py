"""``python -m benchmarks.latency``: the same training step over a network that takes its time.

One worker trains with one ps by TCP, through a proxy in this process (see `benchmarks.proxy`) that adds 1, 5 and 20 ms
to every round trip, half of them on each way; beside it the same two through the same proxy when it adds nothing. A
step computes for about 20 ms and moves 1.6 MB each way. One thread each. Where strategies can be told not to wait for
their own values (``pipeline=True``), that is measured as well.

A proxy in the place of network namespaces with a delaying queue (netem), because many kernels come without that queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.figure import Effort, Figure, compared, run, take_turns
from benchmarks.processes import Child, crew
from benchmarks.proxy import Proxy
from benchmarks.serving import start_servers
from benchmarks.stepper import Spec, can_pipeline, slowest_step, start, steps_per_second

MILLISECONDS = (1, 5, 20)
JUDGED = 5
LEAST_OF_PIPELINE = 0.85
LONGER = 2
"""How much longer turns are than those of other benchmarks: a step is."""


def measure(effort: Effort) -> Iterator[Figure]:
    """Both kinds of steps with each delay. Blocks for about a minute for each kind."""
    for pipeline in (False, True) if can_pipeline() else (False,):
        with Proxy() as proxy, crew() as its_crew:
            servers = start_servers(its_crew, address=proxy.toward)
            spec = Spec(computes=True, pipeline=pipeline)
            worker = start(its_crew, "the worker", spec, servers.env("chief:0", "tcp"))
            yield from _measure(worker, proxy, pipeline, effort)


def _measure(worker: Child, proxy: Proxy, pipeline: bool, effort: Effort) -> Iterator[Figure]:
    step_seconds = slowest_step([worker])

    def rate(delay: float) -> float:
        proxy.delay = delay / 2
        return steps_per_second([worker], LONGER * effort.seconds, step_seconds + delay)

    for milliseconds in effort.pick(MILLISECONDS, (JUDGED,)):
        yield compared(
            take_turns(partial(rate, milliseconds / 1000), partial(rate, 0.0), effort.repeats),
            "latency",
            "pipelined step" if pipeline else "step",
            size=milliseconds,
            size_unit="ms",
            beside="0 ms",
            unit="steps/s",
            better="more",
            target=LEAST_OF_PIPELINE if pipeline and milliseconds == JUDGED else None,
        )


if __name__ == "__main__":
    run(measure, "The same step with and without a delay on the connection.")
