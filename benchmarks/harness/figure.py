"""A figure: something of ours beside something plain, measured in the same session, and their ratio.

Rules
    * Both sides take turns, and every other turn begins with the other side. The ratio is the median of the ratios of
      such neighbours in time, because machines drift.
    * A figure bears its target, where one was promised.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import msgspec
from rich.table import Table

Pair = tuple[float, float]
"""The results of one turn: ours, and the other side's."""

Side = Callable[[], float]
"""Takes a turn. Blocks until it is over, and returns its result."""

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))
COLUMNS = ("case", "of", "measured", "beside", "ratio", "of the turns", "target", "reached")


class Subject(msgspec.Struct, kw_only=True, frozen=True):
    """The subject of a figure.

    Attributes:
        benchmark: The name of the case's module, which the harness fills in.
        case: What is measured.
        size: Number of bytes, workers and so on of which it is measured.
        size_unit: The unit of ``size``.
        beside: What it is compared with.
        unit: The unit of both results.
        better: Whether a good ratio is a large one (``more``) or a small one (``less``).
        target: The ratio that was promised, None if none was.
    """

    benchmark: str = ""
    case: str
    size: float = 1
    size_unit: str
    beside: str
    unit: str = "steps/s"
    better: Literal["more", "less"] = "more"
    target: float | None = None

    def measure(self, ours: Side, other: Side, repeats: int) -> Figure:
        """Have both sides take turns, and return the figure that results."""
        return self.figure(take_turns(ours, other, repeats))

    def figure(self, pairs: Sequence[Pair]) -> Figure:
        """Return the figure of the results of some turns."""
        ratios = [ours / other for ours, other in pairs]
        measured, baseline = (statistics.median(side) for side in zip(*pairs, strict=True))
        return Figure(
            **msgspec.structs.asdict(self),
            measured=measured,
            baseline=baseline,
            ratio=statistics.median(ratios),
            ratios=ratios,
        )


class Figure(Subject, kw_only=True, frozen=True):
    """The measurement of a `Subject`.

    Attributes:
        measured: Our result, the median of the turns.
        baseline: The other side's result, the median of the turns.
        ratio: ``measured`` divided by ``baseline``, the median of ``ratios``.
        ratios: The ratio of each turn.
    """

    measured: float
    baseline: float
    ratio: float
    ratios: list[float]

    @property
    def key(self) -> tuple[str, str, float]:
        """The identity of the figure, the same in every session."""
        return self.benchmark, self.case, self.size

    @property
    def is_reached(self) -> bool | None:
        """Whether the ratio is as good as promised; None if nothing was promised."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.better == "more" else self.ratio <= self.target

    def cells(self) -> tuple[str, ...]:
        """Return the figure as texts, one for each of `COLUMNS`."""
        sign = ">=" if self.better == "more" else "<="
        return (
            self.case,
            amount(self.size, self.size_unit),
            amount(self.measured, self.unit),
            f"{self.beside}: {amount(self.baseline, self.unit)}",
            f"{self.ratio:.3g}",
            f"{min(self.ratios):.3g} to {max(self.ratios):.3g}",
            "" if self.target is None else f"{sign} {self.target:.3g}",
            {None: "", True: "yes", False: "NO"}[self.is_reached],
        )

    @classmethod
    def tables(cls, title: str, lines: Sequence[Figure]) -> list[Table]:
        """Return a table of figures, which is narrower than `cells`."""
        rows = []
        for figure in lines:
            *texts, turns, target, reached = figure.cells()
            ratios = f"{texts.pop()}\n({turns})" if len(figure.ratios) > 1 else texts.pop()
            rows.append((*texts, ratios, f"{target} {reached}".strip()))
        return [table(title, (*COLUMNS[:5], "target"), rows, ("of", "measured", "ratio"))]


def take_turns(ours: Side, other: Side, repeats: int) -> list[Pair]:
    """Have both sides take turns, every other time the other one first, and return the results."""
    pairs = []
    for turn in range(repeats):
        if turn % 2:
            baseline = other()
            pairs.append((ours(), baseline))
        else:
            pairs.append((ours(), other()))
    return pairs


def seconds_each(action: Callable[[], object], seconds: float = 0.0) -> float:
    """Act for about ``seconds``, at least once, and return the mean seconds of a time."""
    begun, count = time.perf_counter(), 0
    while (took := time.perf_counter() - begun) < seconds or not count:
        action()
        count += 1
    return took / count


def amount(value: float, unit: str) -> str:
    """Return a number with its unit, for people.

    >>> amount(4000, "B"), amount(2.5e-5, "s"), amount(2000, "variables"), amount(0, "ms"), amount(0.25, "s")
    ('4 kB', '25 us', '2,000 variables', '0 ms', '250 ms')
    >>> amount(0, "B"), amount(-4000, "B")  # memory beyond that of an idle task may be less than none
    ('0 B', '-4 kB')
    """
    if unit not in ("B", "B/s", "s"):
        return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    fitting = (prefix for prefix in PREFIXES if abs(value) >= prefix[0])
    factor, prefix = next(fitting, PREFIXES[-1]) if value else (1.0, "")
    return f"{value / factor:.3g} {prefix}{unit}"


def read(lines: Iterable[bytes | str]) -> Iterator[Figure]:
    """Yield the figures of JSON lines.

    Raises:
        msgspec.DecodeError: If a line is no figure.
    """
    return (msgspec.json.decode(line, type=Figure) for line in lines if line.strip())


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """Return a table for people; the columns in ``right`` are aligned to the right."""
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left")
    for row in rows:
        shown.add_row(*row)
    return shown
