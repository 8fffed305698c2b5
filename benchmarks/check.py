"""``python -m benchmarks.check``: is anything slower than when results were committed? Measures, and compares ratios.

A ratio is worse by the factor by which it differs from the committed one, on the side that is not better. Figures that
only one of the two sessions has are not judged. A shared machine is noisy: what fails here once should be measured
again, alone, before anyone believes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.figure import FULL, QUICK, Figure, amount, read
from benchmarks.processes import ROOT, BenchmarkError
from benchmarks.step import fail
from benchmarks.suite import measure
from paramserver.errors import ParameterServerError

COMMITTED = ROOT / "benchmarks" / "results.jsonl"
TOLERANCE = 0.3
"""By which share a ratio may be worse: machines drift, and what this is to notice is more than that."""


class Change(NamedTuple):
    """A figure of two sessions.

    Attributes:
        now: Of the present session.
        before: The committed one.
    """

    now: Figure
    before: Figure

    @property
    def worse(self) -> float:
        """By which share the ratio is worse than before; negative if it is better."""
        factor = self.now.ratio / self.before.ratio
        return (1 / factor if self.now.better == "more" else factor) - 1


def changes(now: Iterable[Figure], before: Iterable[Figure]) -> list[Change]:
    """What both sessions measured.

    Raises:
        BenchmarkError: If that is nothing.
    """
    committed = {figure.key: figure for figure in before}
    found = [Change(figure, committed[figure.key]) for figure in now if figure.key in committed]
    if not found:
        raise BenchmarkError("nothing was measured that the committed results have, too; are they of another version?")
    return found


def change_table(found: Sequence[Change], tolerance: float) -> Table:
    """The changes for people."""
    shown = Table(title=f"ratios now and as committed; one may be worse by {tolerance:.0%}")
    for column in ("benchmark", "case", "of", "now", "committed", "worse by", ""):
        shown.add_column(column)
    for change in found:
        now, before = change
        verdict = "TOO MUCH" if change.worse > tolerance else ""
        size = amount(now.size, now.size_unit)
        ratios = (f"{now.ratio:.3g}", f"{before.ratio:.3g}")
        shown.add_row(now.benchmark, now.case, size, *ratios, f"{change.worse:+.0%}", verdict)
    return shown


def main(
    file: Annotated[Path | None, typer.Argument(metavar="[RESULTS.jsonl]", help="Measured already.")] = None,
    committed: Annotated[Path, typer.Option(metavar="FILE", help="What to compare with.")] = COMMITTED,
    tolerance: Annotated[float, typer.Option(metavar="SHARE", help="By which a ratio may be worse.")] = TOLERANCE,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and shorter turns.")] = False,
) -> None:
    """Compare with the committed results. The exit code is 1 if a ratio is worse than tolerated."""
    torch.set_num_threads(1)  # as `benchmarks.figure.run` does
    try:
        now = measure(QUICK if quick else FULL) if file is None else read(file.read_bytes().splitlines())
        found = changes(now, read(committed.read_bytes().splitlines()))
    except (BenchmarkError, ParameterServerError, msgspec.DecodeError, OSError) as error:
        raise fail(error) from error
    Console().print(change_table(found, tolerance))
    if any(change.worse > tolerance for change in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
