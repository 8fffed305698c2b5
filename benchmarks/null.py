"""``python -m benchmarks.null``: a step without any compute, beside the same step of plain PyTorch.

    * Dense: the gradients are there; a step is ``optimizer.step()`` through the public API and nothing else. One worker
      pushes them to one ps, which applies SGD, and pulls what comes of it.
    * Rows: a step looks up 32 random rows, 64 wide, of an embedding table on one ps, and SGD updates them. How long it
      takes must not depend on the table's size: beside other sizes stands the same step with a table of 256 MB, too.

Beside a step stands a process of plain PyTorch that takes the same step in its own memory. What the two differ by is
what a step pays for having its variables elsewhere. Each task has one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.figure import Effort, Figure, amount, compared, run, take_turns
from benchmarks.models import LANE_NAMES, LANES
from benchmarks.processes import Child, Crew, crew
from benchmarks.serving import ONE_THREAD, start_servers
from benchmarks.stepper import Spec, slowest_step, start, steps_per_second

SIZES = (4, 1_000_000, 100_000_000)
FEW = (4, 100_000_000)

ROWS = 32
TABLE = 256_000_000
OTHER_TABLES = (64_000_000, 1_024_000_000, 4_096_000_000)
MOST_FOR_LARGER = 1.1
JUDGED = OTHER_TABLES[-1]


def measure(effort: Effort) -> Iterator[Figure]:
    """Steps of each size on each lane. Blocks for about two minutes; takes 6 GB of memory."""
    for nbytes in effort.pick(SIZES, FEW):
        yield from _dense(nbytes, effort)
    for lane in effort.pick(LANES, LANES):
        yield from _rows(lane, effort)


def _dense(nbytes: int, effort: Effort) -> Iterator[Figure]:
    spec = Spec(nbytes=nbytes)
    with crew() as its_crew:
        workers = {lane: _start_worker(its_crew, lane, spec) for lane in LANES}
        plain = start(its_crew, "plain PyTorch", spec, ONE_THREAD)
        step_seconds = slowest_step([*workers.values(), plain])
        for lane, worker in workers.items():
            yield _beside_plain("null step", lane, nbytes, worker, plain, step_seconds, effort)


def _rows(lane: str, effort: Effort) -> Iterator[Figure]:
    others = effort.pick(OTHER_TABLES, OTHER_TABLES[-1:])
    with crew() as its_crew:
        specs = {nbytes: Spec(nbytes=nbytes, rows=ROWS) for nbytes in (TABLE, *others)}
        workers = {nbytes: _start_worker(its_crew, lane, spec) for nbytes, spec in specs.items()}
        plain = {nbytes: start(its_crew, "plain PyTorch", spec, ONE_THREAD) for nbytes, spec in specs.items()}
        step_seconds = slowest_step([*workers.values(), *plain.values()])
        for nbytes, worker in workers.items():
            yield _beside_plain(f"step of {ROWS} rows", lane, nbytes, worker, plain[nbytes], step_seconds, effort)

        def seconds(nbytes: int) -> float:
            return 1 / steps_per_second([workers[nbytes]], effort.seconds, step_seconds)

        for nbytes in others:
            yield compared(
                take_turns(partial(seconds, nbytes), partial(seconds, TABLE), effort.repeats),
                "null",
                f"step of {ROWS} rows of another table, {LANE_NAMES[lane]}",
                size=nbytes,
                size_unit="B",
                beside=amount(TABLE, "B"),
                unit="s",
                better="less",
                target=MOST_FOR_LARGER if nbytes == JUDGED else None,
            )


def _start_worker(its_crew: Crew, lane: str, spec: Spec) -> Child:
    """Start a ps and the one worker that trains with it."""
    return start(its_crew, f"the worker on {lane}", spec, start_servers(its_crew).env("chief:0", lane))


def _beside_plain(
    step: str, lane: str, nbytes: int, worker: Child, plain: Child, step_seconds: float, effort: Effort
) -> Figure:
    ours, other = (partial(steps_per_second, [side], effort.seconds, step_seconds) for side in (worker, plain))
    return compared(
        take_turns(ours, other, effort.repeats),
        "null",
        f"{step}, {LANE_NAMES[lane]}",
        size=nbytes,
        size_unit="B",
        beside="plain PyTorch",
        unit="steps/s",
        better="more",
    )


if __name__ == "__main__":
    run(measure, "A step without compute, beside the same step of plain PyTorch.")
