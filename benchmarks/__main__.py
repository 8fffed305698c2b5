"""``python -m benchmarks``: every promise about speed and memory, measured, beside what was promised."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.models import LANES, MODELS
from benchmarks.processes import BenchmarkError
from benchmarks.step import Holding, Result, StepOptions, fail, measure, print_results
from paramserver.errors import ParameterServerError

TARGET_RATIOS = {("small", "auto"): 1.25, ("large", "auto"): 0.95, ("small", "tcp"): 1.0, ("large", "tcp"): 0.6}
"""At least this many times the steps/s of plain PyTorch, on two cores, where so many were promised."""

WORKER_COPIES = 2 * 1.05
"""At most values and gradients, plus 5%."""

PS_COPIES = 1.05
"""At most values and slots, plus 5%."""

MEMORY_MODEL = "large"
"""Of which memory is judged: 5% of a model that is no larger than the allocator's slack would say nothing."""


@dataclass(frozen=True)
class Verdict:
    """A promise and what was measured."""

    promise: str
    limit: str
    measured: str
    is_kept: bool


def judge(result: Result) -> list[Verdict]:
    """What was promised for a model on a lane, and whether it is so."""
    where = f"{result.model}, {result.lane}"
    verdicts = []
    if (target := TARGET_RATIOS.get((result.model, result.lane))) is not None:
        is_kept = result.ratio >= target
        verdicts.append(Verdict(f"{where}: times plain PyTorch", f">= {target:.2f}", f"{result.ratio:.2f}", is_kept))
    if result.model != MEMORY_MODEL:
        return verdicts
    return [
        *verdicts,
        *_judge_memory(f"{where}: copies of the model on a worker", result.worker_memory, WORKER_COPIES),
        *_judge_memory(f"{where}: copies of values and slots on a ps", result.ps_memory, PS_COPIES),
    ]


def _judge_memory(promise: str, holding: Holding | None, limit: float) -> list[Verdict]:
    if holding is None:
        return []
    return [
        Verdict(f"{promise}, {when}", f"<= {limit:.2f}", f"{copies:.2f}", copies <= limit)
        for when, copies in (("between steps", holding.steady), ("at the peak of training", holding.peak))
    ]


def verdict_table(verdicts: list[Verdict]) -> Table:
    """The verdicts for people."""
    shown = Table("promise", title="what was promised, for two cores")
    for column in ("limit", "measured"):
        shown.add_column(column, justify="right")
    shown.add_column("reached")
    for verdict in verdicts:
        shown.add_row(verdict.promise, verdict.limit, verdict.measured, "yes" if verdict.is_kept else "NO")
    return shown


def main(
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a window.")] = 3.0,
    repeats: Annotated[int, typer.Option(metavar="R", help="How many pairs of windows.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each result instead.")] = False,
) -> None:
    """Measure all models on both lanes. The exit code is 0 whether or not a promise is kept."""
    results = []
    for lane, model in itertools.product(LANES, MODELS):
        try:
            with Console(stderr=True).status(f"measuring {model} on lane {lane}"):
                results.append(measure(StepOptions(model=model, lane=lane, seconds=seconds, repeats=repeats)))
        except (BenchmarkError, ParameterServerError) as error:
            raise fail(error) from error
        if as_json:
            sys.stdout.buffer.write(msgspec.json.encode(results[-1]) + b"\n")
            sys.stdout.buffer.flush()
    if not as_json:
        print_results(results)
        Console().print(verdict_table([verdict for result in results for verdict in judge(result)]))


if __name__ == "__main__":
    typer.run(main)
