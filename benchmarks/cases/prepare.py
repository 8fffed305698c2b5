"""``prepare`` of a large model on a new ps, which takes the memory of all values and gradients, beside a limit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_cluster, threads_env
from benchmarks.harness.crew import crew
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.options import LANE_NAMES, LANES, Options
from benchmarks.harness.programs.preparing import PROGRAM

NBYTES = 1_000_000_000
LIMIT = 2.5
"""The promised seconds."""

PATIENCE = 120.0


def measure(options: Options) -> Iterator[Figure]:
    """Measure both lanes. Blocks for about a minute; takes 4 GB of memory."""
    for lane in LANES:
        yield Subject(
            case=f"prepare, {LANE_NAMES[lane]}",
            size=NBYTES,
            size_unit="B",
            beside="the limit",
            unit="s",
            better="less",
            target=1.0,
        ).measure(partial(_prepare, lane), lambda: LIMIT, options.repeats)


def _prepare(lane: str) -> float:
    with crew() as its_crew:
        cluster = start_cluster(its_crew, shared=threads_env(2))
        chief = its_crew.start_module("chief:0", PROGRAM, str(NBYTES), cluster.env("chief:0", lane))
        return chief.receive(float, PATIENCE)


CASE = Case(
    title="Preparing a large model",
    options=Options,
    measure=measure,
    is_in_suite=False,
)
