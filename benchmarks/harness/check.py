"""``python -m benchmarks check``: measure the suite, and compare its ratios with the committed ones.

A ratio is worse by the factor by which it differs from the committed one, on the side that is not better. Figures that
only one of the two sessions has are not judged. A shared machine is noisy: measure again, alone, before you believe a
failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from benchmarks.harness.case import measure_suite
from benchmarks.harness.errors import BenchmarkError, errors_for_people
from benchmarks.harness.figure import Figure, amount, read, table
from benchmarks.harness.options import QUICK, Effort

COMMITTED = ROOT / "benchmarks" / "results.jsonl"
TOLERANCE = 0.3
"""The share by which a ratio may be worse: more than machines drift."""


class Change(NamedTuple):
    """A figure of two sessions.

    Attributes:
        now: The figure of the present session.
        before: The committed figure.
    """

    now: Figure
    before: Figure

    @property
    def worse(self) -> float:
        """The share by which the ratio is worse than before; negative if it is better."""
        factor = self.now.ratio / self.before.ratio
        return (1 / factor if self.now.better == "more" else factor) - 1


def changes(now: Iterable[Figure], before: Iterable[Figure]) -> list[Change]:
    """Return the figures that both sessions have measured.

    Raises:
        BenchmarkError: If there is none.
    """
    committed = {figure.key: figure for figure in before}
    found = [Change(figure, committed[figure.key]) for figure in now if figure.key in committed]
    if not found:
        raise BenchmarkError("nothing was measured that the committed results have, too; are they of another version?")
    return found


def change_table(found: Sequence[Change], tolerance: float) -> Table:
    """Return the changes for people."""
    columns = ("benchmark", "case", "of", "now", "committed", "worse by", "")
    title = f"ratios now and as committed; one may be worse by {tolerance:.0%}"
    return table(title, columns, (_cells(change, tolerance) for change in found))


def _cells(change: Change, tolerance: float) -> tuple[str, ...]:
    now, before = change
    size = amount(now.size, now.size_unit)
    verdict = "TOO MUCH" if change.worse > tolerance else ""
    return now.benchmark, now.case, size, f"{now.ratio:.3g}", f"{before.ratio:.3g}", f"{change.worse:+.0%}", verdict


@errors_for_people()
def main(
    file: Annotated[Path | None, typer.Argument(metavar="[RESULTS.jsonl]", help="Figures measured already.")] = None,
    committed: Annotated[Path, typer.Option(metavar="FILE", help="The figures to compare with.")] = COMMITTED,
    tolerance: Annotated[float, typer.Option(metavar="SHARE", help="By which a ratio may be worse.")] = TOLERANCE,
    quick: Annotated[bool, typer.Option("--quick", help="Measure fewer sizes, in shorter and fewer turns.")] = False,
) -> None:
    """Compare the suite with the committed results; the exit code is 1 if a ratio is worse than tolerated."""
    now = read(file.read_bytes().splitlines()) if file else measure_suite(Effort(**(QUICK if quick else {})))
    found = changes(now, read(committed.read_bytes().splitlines()))
    Console().print(change_table(found, tolerance))
    if any(change.worse > tolerance for change in found):
        raise typer.Exit(1)
