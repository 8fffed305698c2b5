"""A measured figure: something of ours beside something plain, in the same session, and their ratio.

Rules
    * Both sides take turns, and every other turn begins with the other side. The ratio is the median of the ratios of
      such neighbours in time, because machines drift.
    * The figure tells for which ratio it was meant, where one was promised.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.processes import BenchmarkError
from benchmarks.step import fail
from paramserver.errors import ParameterServerError

Pair = tuple[float, float]
"""What one turn has measured: of ours, and of the other side."""

Size = TypeVar("Size", int, str)
"""Of what is measured: a number, or the name of a model."""


SI = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))


class Figure(msgspec.Struct, kw_only=True, frozen=True):
    """What was measured; `key` says of what.

    Attributes:
        benchmark: The module that measures it: ``lanes``.
        case: What is measured.
        size: Of what it is measured: so many bytes, or workers.
        size_unit: What ``size`` counts.
        measured: A median of the turns.
        beside: What it is compared with.
        baseline: What that came to, a median of the turns.
        unit: Of ``measured`` and ``baseline``.
        ratio: ``measured`` by ``baseline``, the median of ``ratios``.
        ratios: Of each turn.
        better: Whether a good ratio is one of ``more`` or of ``less``.
        target: The ratio that was promised, None if none was.
    """

    benchmark: str
    case: str
    size: float
    size_unit: str
    measured: float
    beside: str
    baseline: float
    unit: str
    ratio: float
    ratios: list[float]
    better: Literal["more", "less"]
    target: float | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """What this is a figure of: the same in every session."""
        return self.benchmark, self.case, self.size

    @property
    def is_reached(self) -> bool | None:
        """Whether the ratio is as good as promised; None if nothing was."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.better == "more" else self.ratio <= self.target

    def cells(self) -> tuple[str, ...]:
        """The figure as texts, one for each of `COLUMNS`."""
        sign = ">=" if self.better == "more" else "<="
        return (
            self.case,
            amount(self.size, self.size_unit),
            amount(self.measured, self.unit),
            f"{self.beside}: {amount(self.baseline, self.unit)}",
            f"{self.ratio:.3g}",
            f"{min(self.ratios):.3g} to {max(self.ratios):.3g}",
            "" if self.target is None else f"{sign} {self.target:g}",
            {None: "", True: "yes", False: "NO"}[self.is_reached],
        )


COLUMNS = ("case", "of", "measured", "beside", "ratio", "of the turns", "target", "reached")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        seconds: Length of a turn of one side.
        repeats: How many turns each side takes.
        picked: Which of a benchmark's sizes are measured.
    """

    seconds: float
    repeats: int
    picked: Literal["all", "few", "least"]

    def pick(self, sizes: tuple[Size, ...], few: tuple[Size, ...]) -> tuple[Size, ...]:
        """What to measure of all the ascending sizes: all, the few that tell the most, or the least one."""
        return {"all": sizes, "few": few, "least": sizes[:1]}[self.picked]


FULL = Effort(seconds=0.5, repeats=5, picked="all")
QUICK = Effort(seconds=0.25, repeats=3, picked="few")
SMOKE = Effort(seconds=0.02, repeats=1, picked="least")

Measure = Callable[[Effort], Iterable[Figure]]
"""A benchmark. It raises BenchmarkError if a process fails, and ParameterServerError if a ps refuses."""


def take_turns(ours: Callable[[], float], other: Callable[[], float], repeats: int) -> list[Pair]:
    """Have both sides measure in turns, every other time the other one first."""
    pairs = []
    for turn in range(repeats):
        if turn % 2:
            baseline = other()
            pairs.append((ours(), baseline))
        else:
            pairs.append((ours(), other()))
    return pairs


def seconds_each(action: Callable[[], object], seconds: float) -> float:
    """Act for about ``seconds``, at least once; the mean seconds of a time."""
    begun, count = time.perf_counter(), 0
    while (took := time.perf_counter() - begun) < seconds or not count:
        action()
        count += 1
    return took / count


def compared(
    pairs: Sequence[Pair],
    benchmark: str,
    case: str,
    *,
    size: float,
    size_unit: str,
    beside: str,
    unit: str,
    better: Literal["more", "less"],
    target: float | None = None,
) -> Figure:
    """The figure that some turns come to; the arguments are attributes of `Figure`."""
    ratios = [ours / other for ours, other in pairs]
    measured, baseline = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Figure(
        benchmark=benchmark,
        case=case,
        size=size,
        size_unit=size_unit,
        measured=measured,
        beside=beside,
        baseline=baseline,
        unit=unit,
        ratio=statistics.median(ratios),
        ratios=ratios,
        better=better,
        target=target,
    )


def amount(value: float, unit: str) -> str:
    """A number with its unit, for people.

    >>> amount(4000, "B"), amount(2.5e-5, "s"), amount(2000, "variables"), amount(0, "ms"), amount(0.25, "s")
    ('4 kB', '25 us', '2,000 variables', '0 ms', '250 ms')
    """
    if unit not in ("B", "B/s", "s"):
        return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    factor, prefix = next(((factor, prefix) for factor, prefix in SI if value >= factor), SI[-1])
    return f"{value / factor:.3g} {prefix}{unit}"


def table(figures: Iterable[Figure], title: str) -> Table:
    """The figures for people."""
    shown = Table(title=title)
    for column in COLUMNS:
        shown.add_column(column, justify="right" if column in ("of", "measured", "ratio") else "left")
    for figure in figures:
        shown.add_row(*figure.cells())
    return shown


def read(lines: Iterable[bytes | str]) -> Iterator[Figure]:
    """The figures of JSON lines.

    Raises:
        msgspec.DecodeError: If a line is no figure.
    """
    return (msgspec.json.decode(line, type=Figure) for line in lines if line.strip())


def run(measure: Measure, title: str) -> None:
    """The command line of a benchmark. Blocks until it is over; exits with 1 if it cannot be made."""

    def main(
        quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and shorter turns.")] = False,
        smoke: Annotated[bool, typer.Option("--smoke", hidden=True)] = False,
        as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each result instead.")] = False,
    ) -> None:
        torch.set_num_threads(1)  # both sides of every figure take one
        figures = []
        try:
            for figure in measure(SMOKE if smoke else QUICK if quick else FULL):
                figures.append(figure)
                if as_json:
                    sys.stdout.buffer.write(msgspec.json.encode(figure) + b"\n")
                    sys.stdout.buffer.flush()
        except (BenchmarkError, ParameterServerError, OSError) as error:
            raise fail(error) from error
        if not as_json:
            Console().print(table(figures, title))

    main.__doc__ = title
    typer.run(main)
