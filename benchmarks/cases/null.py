"""A step without any compute, beside the same step of plain PyTorch.

    * Dense: the gradients are there; a step is ``optimizer.step()`` through the public API and nothing else. One worker
      pushes them to one ps, which applies SGD, and pulls the new values.
    * Rows: a step looks up 32 random rows, 64 wide, of an embedding table on one ps, and SGD updates them. Its duration
      must not depend on the table's size: other sizes are also measured beside the same step with a table of 256 MB.

Plain PyTorch takes the same step in its own memory. The difference is the price of having the variables elsewhere. Each
task has one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_cluster, start_plain, start_trainer
from benchmarks.harness.crew import Child, Crew, crew
from benchmarks.harness.figure import Figure, Subject, amount
from benchmarks.harness.options import LANE_NAMES, LANES, Effort
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.window import seconds_per_step, sides, slowest_step
from benchmarks.models.null import Parameters, Rows

SIZES = (4, 1_000_000, 100_000_000)
FEW = (4, 100_000_000)

ROWS = 32
TABLE = 256_000_000
OTHER_TABLES = (64_000_000, 1_024_000_000, 4_096_000_000)
MOST_FOR_LARGER = 1.1
JUDGED = OTHER_TABLES[-1]


def measure(options: Effort) -> Iterator[Figure]:
    """Measure steps of each size on each lane. Blocks for about two minutes; takes 6 GB of memory."""
    for nbytes in options.pick(SIZES, FEW):
        yield from _dense(nbytes, options)
    for lane in options.pick(LANES, LANES):
        yield from _rows(lane, options)


def _dense(nbytes: int, options: Effort) -> Iterator[Figure]:
    job = Job(model=Parameters(nbytes=nbytes))
    with crew() as its_crew:
        workers = {lane: _start_worker(its_crew, lane, job) for lane in LANES}
        plain = start_plain(its_crew, job)
        step_seconds = slowest_step([*workers.values(), plain])
        for lane, worker in workers.items():
            ours, other = sides(options, step_seconds, [worker], [plain])
            yield _beside_plain("null step", lane, nbytes).measure(ours, other, options.repeats)


def _rows(lane: str, options: Effort) -> Iterator[Figure]:
    others = options.pick(OTHER_TABLES, OTHER_TABLES[-1:])
    jobs = {nbytes: Job(model=Rows(count=ROWS, nbytes=nbytes)) for nbytes in (TABLE, *others)}
    with crew() as its_crew:
        workers = {nbytes: _start_worker(its_crew, lane, job) for nbytes, job in jobs.items()}
        plain = {nbytes: start_plain(its_crew, job) for nbytes, job in jobs.items()}
        step_seconds = slowest_step([*workers.values(), *plain.values()])
        for nbytes, worker in workers.items():
            ours, other = sides(options, step_seconds, [worker], [plain[nbytes]])
            yield _beside_plain(f"step of {ROWS} rows", lane, nbytes).measure(ours, other, options.repeats)
        yield from _beside_table(lane, workers, step_seconds, options)


def _beside_table(lane: str, workers: Mapping[int, Child], step_seconds: float, options: Effort) -> Iterator[Figure]:
    seconds = {
        nbytes: partial(seconds_per_step, [worker], options.seconds, step_seconds) for nbytes, worker in workers.items()
    }
    for nbytes in list(workers)[1:]:
        yield Subject(
            case=f"step of {ROWS} rows of another table, {LANE_NAMES[lane]}",
            size=nbytes,
            size_unit="B",
            beside=amount(TABLE, "B"),
            unit="s",
            better="less",
            target=MOST_FOR_LARGER if nbytes == JUDGED else None,
        ).measure(seconds[nbytes], seconds[TABLE], options.repeats)


def _start_worker(its_crew: Crew, lane: str, job: Job) -> Child:
    """Start a ps and the one worker that trains with it."""
    return start_trainer(its_crew, f"the worker on {lane}", job, start_cluster(its_crew).env("chief:0", lane))


def _beside_plain(step: str, lane: str, nbytes: int) -> Subject:
    return Subject(case=f"{step}, {LANE_NAMES[lane]}", size=nbytes, size_unit="B", beside="plain PyTorch")


CASE = Case(title="A step without compute", options=Effort, measure=measure, order=10)
