"""``python -m benchmarks.step``: global steps/s with parameter servers, beside plain PyTorch in the same run.

The workers and a process of plain PyTorch stand ready at the same time and take turns: one window with all workers at
work, one with plain PyTorch alone with as many threads as all workers have together, and again. What is compared are
neighbours in time, because machines drift; the ratio is the median of the ratios of such pairs.

Memory is what a task holds beyond the same task with a model of a few hundred parameters, between two steps and at its
peak (see ``memory.py`` for what counts).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.memory import Memory
from benchmarks.models import ALL_MODELS, IDLE, LANES, MODELS
from benchmarks.participant import Measured, Ready, Window
from benchmarks.processes import BenchmarkError, Child, Cluster, Crew, crew
from paramserver.errors import ParameterServerError

START_LIMIT = 120.0
LATE_LIMIT = 60.0
IDLE_SECONDS = 0.5
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What is measured.

    Attributes:
        model: One of `MODELS`.
        workers: How many tasks train, the chief included.
        ps: How many parameter servers.
        lane: ``auto`` or ``tcp``.
        threads: Of all workers together, and of plain PyTorch.
        seconds: Length of a window.
        repeats: How many pairs of windows.
    """

    model: str = "small"
    workers: int = 2
    ps: int = 1
    lane: str = "auto"
    threads: int = 2
    seconds: float = 3.0
    repeats: int = 5

    def __post_init__(self) -> None:
        check_choice("model", self.model, MODELS)
        check_choice("lane", self.lane, LANES)
        for name in ("workers", "ps", "repeats"):
            if getattr(self, name) < 1:
                raise BenchmarkError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.threads < self.workers:
            raise BenchmarkError(f"threads: expected {self.workers} or more, one for each worker, got {self.threads}")
        if not self.seconds > 0:
            raise BenchmarkError(f"seconds: expected more than 0, got {self.seconds}")


class Holding(msgspec.Struct, kw_only=True):
    """Memory of a task beyond that of an idle one of its kind, in copies of what it has to hold.

    For a worker a copy is the model's parameters, and the fullest worker counts; for the ps tasks together it is
    values and slots.

    Attributes:
        steady: Between two steps.
        peak: The most at any moment of the training.
        start_peak: The most at any moment until the first steps were done.
        copy_bytes: Bytes of a copy.
        steady_bytes: ``steady`` in bytes.
    """

    steady: float
    peak: float
    start_peak: float
    copy_bytes: int
    steady_bytes: int


class Result(msgspec.Struct, kw_only=True):
    """What was measured; rates are medians over the repeats, in steps per second.

    Attributes:
        model: As in `StepOptions`, like the next six.
        steps_per_second: Global steps, of all workers together.
        plain_steps_per_second: Steps of plain PyTorch.
        ratio: The median of ``ratios``.
        ratios: Of each pair of windows.
        staleness_mean: Over all steps in windows.
        staleness_max: Of one of them.
        worker_memory: Of a worker; None where the system does not tell.
        ps_memory: Of the ps tasks; None where the system does not tell.
    """

    model: str
    lane: str
    workers: int
    ps: int
    threads: int
    seconds: float
    repeats: int
    steps_per_second: float
    plain_steps_per_second: float
    ratio: float
    ratios: list[float]
    staleness_mean: float
    staleness_max: int
    worker_memory: Holding | None
    ps_memory: Holding | None


def measure(options: StepOptions) -> Result:
    """Measure one model on one lane. Blocks for about ``2 * repeats * seconds`` and 15 s.

    Raises:
        BenchmarkError: If a process fails; no process is left behind.
    """
    with crew() as idle_crew:
        idle = _measure_idle(idle_crew, options)
    with crew() as full_crew:
        return _measure_full(full_crew, options, idle)


class Footprint:
    """The memory of the tasks of a cluster, looked at while they wait between two steps."""

    def __init__(self, cluster: Cluster) -> None:
        self._groups = [cluster.workers, cluster.servers]
        self._start = self._read()
        self._seen: list[list[list[Memory | None]]] = []
        for group in self._groups:
            for child in group:
                memory.reset_peak(child.pid)

    def look(self) -> None:
        """Take note of the memory of now."""
        self._seen.append(self._read())

    def workers(self) -> list[tuple[Memory, Memory]] | None:
        """For each worker: in training, and at the end of its start. None where the system does not tell."""
        return self._group(0)

    def servers(self) -> list[tuple[Memory, Memory]] | None:
        """For each ps, as `workers`."""
        return self._group(1)

    def _read(self) -> list[list[Memory | None]]:
        return [[memory.read(child.pid) for child in group] for group in self._groups]

    def _group(self, group: int) -> list[tuple[Memory, Memory]] | None:
        tasks = []
        for index, start in enumerate(self._start[group]):
            seen = [moment[group][index] for moment in self._seen]
            known = [one for one in seen if one is not None]
            if start is None or not known:
                return None
            steady = Memory(int(statistics.median(one.now for one in known)), max(one.peak for one in known))
            tasks.append((steady, start))
        return tasks


def _measure_idle(idle_crew: Crew, options: StepOptions) -> Footprint:
    cluster = start_cluster(idle_crew, IDLE, options)
    await_ready(cluster.workers)
    footprint = Footprint(cluster)
    run_window(cluster.workers, IDLE_SECONDS, step_seconds=0.0)
    footprint.look()
    cluster.end()
    return footprint


def _measure_full(full_crew: Crew, options: StepOptions, idle: Footprint) -> Result:
    cluster = start_cluster(full_crew, options.model, options)
    plain = full_crew.start_plain(options.model, options.threads)
    ready = await_ready([*cluster.workers, plain])
    footprint = Footprint(cluster)
    step_seconds = max(one.step_seconds for one in ready)
    distributed: list[list[Measured]] = []
    alone: list[list[Measured]] = []
    for _ in range(options.repeats):
        distributed.append(run_window(cluster.workers, options.seconds, step_seconds))
        footprint.look()
        alone.append(run_window([plain], options.seconds, step_seconds))
    plain.dismiss()
    cluster.end()
    return _result(options, distributed, alone, footprint, idle, ready[0].store_bytes)


def _result(
    options: StepOptions,
    distributed: Sequence[Sequence[Measured]],
    alone: Sequence[Sequence[Measured]],
    footprint: Footprint,
    idle: Footprint,
    store_bytes: int,
) -> Result:
    rates, plain_rates = ([rate(window) for window in windows] for windows in (distributed, alone))
    ratios = [ours / plain for ours, plain in zip(rates, plain_rates, strict=True)]
    parts = [part for window in distributed for part in window]
    return Result(
        model=options.model,
        lane=options.lane,
        workers=options.workers,
        ps=options.ps,
        threads=options.threads,
        seconds=options.seconds,
        repeats=options.repeats,
        steps_per_second=statistics.median(rates),
        plain_steps_per_second=statistics.median(plain_rates),
        ratio=statistics.median(ratios),
        ratios=ratios,
        staleness_mean=sum(part.staleness for part in parts) / sum(part.steps for part in parts),
        staleness_max=max(part.largest_staleness for part in parts),
        worker_memory=_worker_holding(footprint, idle, ALL_MODELS[options.model].nbytes),
        ps_memory=_ps_holding(footprint, idle, store_bytes),
    )


def rate(window: Iterable[Measured]) -> float:
    """Steps per second of all participants together."""
    return sum(part.steps / part.seconds for part in window)


def _worker_holding(footprint: Footprint, idle: Footprint, copy_bytes: int) -> Holding | None:
    tasks, idle_tasks = footprint.workers(), idle.workers()
    if tasks is None or idle_tasks is None:
        return None
    return _holding(max(_beyond(tasks, idle_tasks)), copy_bytes)


def _ps_holding(footprint: Footprint, idle: Footprint, copy_bytes: int) -> Holding | None:
    tasks, idle_tasks = footprint.servers(), idle.servers()
    if tasks is None or idle_tasks is None:
        return None
    steady, peak, start_peak = (sum(values) for values in zip(*_beyond(tasks, idle_tasks), strict=True))
    return _holding((steady, peak, start_peak), copy_bytes)


def _beyond(
    tasks: Sequence[tuple[Memory, Memory]], idle: Sequence[tuple[Memory, Memory]]
) -> list[tuple[int, int, int]]:
    rows = []
    for (steady, start), (idle_steady, idle_start) in zip(tasks, idle, strict=True):
        now, peak = steady.beyond(idle_steady)
        rows.append((now, peak, start.beyond(idle_start).peak))
    return rows


def _holding(found: tuple[int, int, int], copy_bytes: int) -> Holding:
    steady, peak, start_peak = found
    return Holding(
        steady=steady / copy_bytes,
        peak=peak / copy_bytes,
        start_peak=start_peak / copy_bytes,
        copy_bytes=copy_bytes,
        steady_bytes=steady,
    )


def start_cluster(its_crew: Crew, model: str, options: StepOptions) -> Cluster:
    """Start a cluster that trains ``model``, with the threads of all workers shared among them."""
    threads = options.threads // options.workers
    return its_crew.start_cluster(model, workers=options.workers, ps=options.ps, lane=options.lane, threads=threads)


def await_ready(children: Sequence[Child]) -> list[Ready]:
    """Wait until all participants are warm.

    Raises:
        BenchmarkError: If one of them ends or takes too long.
    """
    return [child.receive(Ready, START_LIMIT) for child in children]


def run_window(children: Sequence[Child], seconds: float, step_seconds: float) -> list[Measured]:
    """Have all participants measure the same ``seconds``. Blocks.

    Args:
        children: The participants.
        seconds: Length of the window.
        step_seconds: What a step takes, about: it decides how long they train before and after.

    Raises:
        BenchmarkError: If one of them ends or takes too long.
    """
    begin = time.monotonic() + max(0.2, 2 * step_seconds)
    end = begin + seconds
    window = Window(begin=begin, end=end, stop=end + max(0.05, 2 * step_seconds))
    for child in children:
        child.order(window)
    limit = window.stop - time.monotonic() + LATE_LIMIT
    return [child.receive(Measured, limit) for child in children]


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise BenchmarkError if an option has a value that it cannot have."""
    if value not in known:
        raise BenchmarkError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def print_results(results: Sequence[Result]) -> None:
    """Show the results to people."""
    console = Console()
    console.print(_speed_table(results))
    console.print(_memory_table(results))


def _speed_table(results: Iterable[Result]) -> Table:
    shown = _table("steps/s of all workers and of plain PyTorch", ("model", "lane", "tasks"))
    for column in ("steps/s", "plain", "ratio", "ratios", "staleness"):
        shown.add_column(column, justify="right")
    for result in results:
        shown.add_row(
            result.model,
            result.lane,
            f"{result.workers}+{result.ps}",
            f"{result.steps_per_second:,.4g}",
            f"{result.plain_steps_per_second:,.4g}",
            f"{result.ratio:.2f}",
            f"{min(result.ratios):.2f}-{max(result.ratios):.2f}",
            f"{result.staleness_mean:.1f} (max {result.staleness_max})",
        )
    shown.caption = "tasks: workers + ps; plain PyTorch has as many threads as all workers together"
    return shown


def _memory_table(results: Iterable[Result]) -> Table:
    shown = _table("memory beyond an idle task, in copies", ("model", "lane", "task"))
    for column in ("a copy, MiB", "between steps", "peak of training", "peak of start"):
        shown.add_column(column, justify="right")
    for result in results:
        for task, holding in (("worker", result.worker_memory), ("ps", result.ps_memory)):
            shown.add_row(result.model, result.lane, task, *_holding_cells(holding))
    shown.caption = "a copy: the model's parameters on a worker, values and slots on the ps tasks"
    return shown


def _table(title: str, names: Iterable[str]) -> Table:
    shown = Table(title=title)
    for name in names:
        shown.add_column(name)
    return shown


def _holding_cells(holding: Holding | None) -> tuple[str, ...]:
    if holding is None:
        return ("?", "?", "?", "?")
    copies = (holding.steady, holding.peak, holding.start_peak)
    return (f"{holding.copy_bytes / MIB:.1f}", *(f"{count:.2f}" for count in copies))


def fail(error: Exception) -> typer.Exit:
    """Say why there is no result; to be raised."""
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


def main(
    model: Annotated[str, typer.Option(metavar="|".join(MODELS), help="What is trained.")] = "small",
    workers: Annotated[int, typer.Option(metavar="N", help="Tasks that train, the chief included.")] = 2,
    ps: Annotated[int, typer.Option(metavar="N", help="Parameter servers.")] = 1,
    lane: Annotated[str, typer.Option(metavar="|".join(LANES), help="How bytes go.")] = "auto",
    threads: Annotated[int, typer.Option(metavar="N", help="Of all workers together, and of plain PyTorch.")] = 2,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a window.")] = 3.0,
    repeats: Annotated[int, typer.Option(metavar="R", help="How many pairs of windows.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Measure global steps/s and memory through the public API, beside plain PyTorch in the same run."""
    try:
        options = StepOptions(
            model=model, workers=workers, ps=ps, lane=lane, threads=threads, seconds=seconds, repeats=repeats
        )
        result = measure(options)
    except (BenchmarkError, ParameterServerError) as error:
        raise fail(error) from error
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    else:
        print_results([result])


if __name__ == "__main__":
    typer.run(main)
