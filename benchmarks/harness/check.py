"""``python -m benchmarks check``: measure the suite, and compare its ratios with the committed ones.

The result is a figure for each ratio: its other side is the committed ratio, its target the tolerance. Figures that
only one of the two sessions has are not judged. A shared machine is noisy: measure again, alone, before you believe a
failure.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import ROOT
from benchmarks.harness.case import measure_suite
from benchmarks.harness.errors import BenchmarkError, errors_for_people
from benchmarks.harness.figure import Figure, Subject, read
from benchmarks.harness.options import QUICK, Effort

COMMITTED = ROOT / "benchmarks" / "results.jsonl"
TOLERANCE = 0.3
"""The share by which a ratio may be worse: more than machines drift."""


def changes(now: Iterable[Figure], before: Iterable[Figure], tolerance: float = TOLERANCE) -> list[Figure]:
    """Compare the ratios of the figures that both sessions have measured.

    Raises:
        BenchmarkError: If there is none.
    """
    committed = {figure.key: figure for figure in before}
    found = [_change(figure, committed[figure.key], tolerance) for figure in now if figure.key in committed]
    if not found:
        raise BenchmarkError("nothing was measured that the committed results have, too; are they of another version?")
    return found


def _change(now: Figure, before: Figure, tolerance: float) -> Figure:
    return Subject(
        benchmark=now.benchmark,
        case=f"{now.benchmark}: {now.case}",
        size=now.size,
        size_unit=now.size_unit,
        beside="committed",
        unit="times",
        better=now.better,
        target=1 / (1 + tolerance) if now.better == "more" else 1 + tolerance,
    ).figure([(now.ratio, before.ratio)])


@errors_for_people()
def main(
    file: Annotated[Path | None, typer.Argument(metavar="[RESULTS.jsonl]", help="Figures measured already.")] = None,
    committed: Annotated[Path, typer.Option(metavar="FILE", help="The figures to compare with.")] = COMMITTED,
    tolerance: Annotated[float, typer.Option(metavar="SHARE", help="By which a ratio may be worse.")] = TOLERANCE,
    quick: Annotated[bool, typer.Option("--quick", help="Measure fewer sizes, in shorter and fewer turns.")] = False,
) -> None:
    """Compare the suite with the committed results; the exit code is 1 if a ratio is worse than tolerated."""
    now = read(file.read_bytes().splitlines()) if file else measure_suite(Effort(**(QUICK if quick else {})))
    found = changes(now, read(committed.read_bytes().splitlines()), tolerance)
    Console().print(*Figure.tables(f"ratios now and as committed; one may be worse by {tolerance:.0%}", found))
    if not all(figure.is_reached for figure in found):
        raise typer.Exit(1)
