"""Global steps/s with parameter servers, beside plain PyTorch, and the memory of the tasks.

The workers and a process of plain PyTorch stand ready at the same time and take turns: one window with all workers at
work, one with plain PyTorch alone with as many threads as all workers have together, and again. The ratio is the median
of the ratios of such neighbours in time, because machines drift.

Memory is what a task holds beyond the same task with a model of a few hundred parameters, between two steps and at its
peak (see `benchmarks.harness.memory`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from benchmarks.harness.case import Case
from benchmarks.harness.cluster import Cluster, start_plain, start_training
from benchmarks.harness.crew import Crew, crew
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.footprint import Footprint, Holding, beyond, total
from benchmarks.harness.options import LANES, Options, check_choice, check_least
from benchmarks.harness.participant import Measured
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.window import await_ready, rate, run_window
from benchmarks.models.catalogue import IDLE, MODELS, AnyModel

IDLE_SECONDS = 0.5

TARGET_RATIOS = {("small", "auto"): 1.25, ("large", "auto"): 0.95, ("small", "tcp"): 1.0, ("large", "tcp"): 0.6}
"""The promised ratios to the steps/s of plain PyTorch, for two cores."""

WORKER_COPIES = 2 * 1.05
"""The promised largest memory of a worker: values and gradients, plus 5%."""

PS_COPIES = 1.05
"""The promised largest memory of the ps tasks: values and slots, plus 5%."""

MEMORY_MODEL = "large"
"""The model whose memory is judged: 5% of a model as small as the allocator's slack would say nothing."""


class StepOptions(Options, kw_only=True, frozen=True):
    """The combination that is measured.

    Attributes:
        model: A name of `MODELS`.
        workers: Number of tasks that train, the chief included.
        ps: Number of parameter servers.
        lane: A name of `LANES`.
        threads: Threads of all workers together, and of plain PyTorch.
    """

    model: Annotated[str, typer.Option(metavar="|".join(MODELS), help="The model that is trained.")] = "small"
    workers: Annotated[int, typer.Option(metavar="N", help="Tasks that train, the chief included.")] = 2
    ps: Annotated[int, typer.Option(metavar="N", help="Parameter servers.")] = 1
    lane: Annotated[str, typer.Option(metavar="|".join(LANES), help="The lane to the parameter servers.")] = "auto"
    threads: Annotated[int, typer.Option(metavar="N", help="Of all workers together, and of plain PyTorch.")] = 2

    def __post_init__(self) -> None:
        check_choice("model", self.model, MODELS)
        check_choice("lane", self.lane, LANES)
        check_least(self, "workers", "ps")
        if self.threads < self.workers:
            raise BenchmarkError(f"threads: expected {self.workers} or more, one for each worker, got {self.threads}")
        super().__post_init__()


class Result(StepOptions, kw_only=True, frozen=True):
    """The result for a combination; rates are medians over the repeats, in steps per second.

    Attributes:
        steps_per_second: Global steps, of all workers together.
        plain_steps_per_second: Steps of plain PyTorch.
        ratio: The median of ``ratios``.
        ratios: The ratio of each pair of windows.
        staleness_mean: Mean over all steps in windows.
        staleness_max: Largest staleness of a step.
        worker_memory: Memory of a worker; None where the system does not tell.
        ps_memory: Memory of the ps tasks; None where the system does not tell.
    """

    steps_per_second: float
    plain_steps_per_second: float
    ratio: float
    ratios: list[float]
    staleness_mean: float
    staleness_max: int
    worker_memory: Holding | None
    ps_memory: Holding | None

    @classmethod
    def tables(cls, title: str, lines: Sequence[Result]) -> list[Table]:
        """Return a table of the results as figures, with the promises about them."""
        (shown,) = Figure.tables(title, [figure for result in lines for figure in result.figures()])
        staleness = (f"{one.model}, {one.lane} {one.staleness_mean:.1f} (max {one.staleness_max})" for one in lines)
        shown.caption = f"staleness: {'; '.join(staleness)}"
        return [shown]

    def figures(self) -> Iterator[Figure]:
        """Yield the ratio to plain PyTorch, and the memory of workers and ps tasks in copies of their values."""
        is_promised = (self.workers, self.ps, self.threads) == (2, 1, 2)
        where = f"{self.model}, {self.lane}"
        yield Figure(
            case=f"{where}: times plain PyTorch",
            size=self.workers,
            size_unit=f"workers, {self.ps} ps",
            measured=self.steps_per_second,
            beside=f"plain PyTorch, threads: {self.threads}",
            baseline=self.plain_steps_per_second,
            ratio=self.ratio,
            ratios=self.ratios,
            target=TARGET_RATIOS.get((self.model, self.lane)) if is_promised else None,
        )
        judges_memory = is_promised and self.model == MEMORY_MODEL
        for what, holding, limit in (
            ("copies of the model on a worker", self.worker_memory, WORKER_COPIES),
            ("copies of values and slots on a ps", self.ps_memory, PS_COPIES),
        ):
            if holding is not None:
                yield from _memory_figures(f"{where}: {what}", holding, limit if judges_memory else None)


def _memory_figures(what: str, holding: Holding, limit: float | None) -> Iterator[Figure]:
    for when, copies, target in (
        ("between steps", holding.steady, limit),
        ("at the peak of training", holding.peak, limit),
        ("at the peak of the start", holding.start_peak, None),
    ):
        yield Subject(
            case=f"{what}, {when}", size_unit="task", beside="a copy", unit="B", better="less", target=target
        ).figure([(copies * holding.copy_bytes, holding.copy_bytes)])


def measure(options: StepOptions) -> Iterator[Result]:
    """Measure one model on one lane. Blocks for about ``2 * repeats * seconds`` and 15 s.

    Raises:
        BenchmarkError: If a process fails; no process is left behind.
    """
    with crew() as idle_crew:
        idle = _measure_idle(idle_crew, options)
    with crew() as full_crew:
        yield _measure_full(full_crew, options, idle)


def _start_tasks(its_crew: Crew, model: AnyModel, options: StepOptions) -> Cluster:
    """Start a cluster that trains ``model``, with the threads of all workers shared among them."""
    threads = options.threads // options.workers
    return start_training(
        its_crew, Job(model=model), workers=options.workers, ps=options.ps, lane=options.lane, threads=threads
    )


def _measure_idle(its_crew: Crew, options: StepOptions) -> tuple[Footprint, Footprint]:
    cluster = _start_tasks(its_crew, IDLE, options)
    await_ready(cluster.workers)
    footprints = Footprint(cluster.workers), Footprint(cluster.servers)
    run_window(cluster.workers, IDLE_SECONDS, step_seconds=0.0)
    for footprint in footprints:
        footprint.look()
    cluster.end()
    return footprints


def _measure_full(its_crew: Crew, options: StepOptions, idle: tuple[Footprint, Footprint]) -> Result:
    model = MODELS[options.model]
    cluster = _start_tasks(its_crew, model, options)
    plain = start_plain(its_crew, Job(model=model), options.threads)
    ready = await_ready([*cluster.workers, plain])
    step_seconds = max(one.step_seconds for one in ready)
    workers, servers = Footprint(cluster.workers), Footprint(cluster.servers)
    pairs: list[tuple[list[Measured], list[Measured]]] = []
    for _ in range(options.repeats):
        window = run_window(cluster.workers, options.seconds, step_seconds)
        workers.look()
        servers.look()
        pairs.append((window, run_window([plain], options.seconds, step_seconds)))
    plain.dismiss()
    cluster.end()
    ratios = [rate(ours) / rate(other) for ours, other in pairs]
    parts = [part for ours, _ in pairs for part in ours]
    return Result(
        **msgspec.structs.asdict(options),
        steps_per_second=statistics.median(rate(ours) for ours, _ in pairs),
        plain_steps_per_second=statistics.median(rate(other) for _, other in pairs),
        ratio=statistics.median(ratios),
        ratios=ratios,
        staleness_mean=sum(part.staleness for part in parts) / sum(part.steps for part in parts),
        staleness_max=max(part.largest_staleness for part in parts),
        worker_memory=beyond(workers, idle[0], model.nbytes, max),
        ps_memory=beyond(servers, idle[1], ready[0].store_bytes, total),
    )


CASE = Case(
    title="A training step and its memory, beside plain PyTorch",
    options=StepOptions,
    measure=measure,
    is_in_suite=False,
)
