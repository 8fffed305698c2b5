"""Figures as pictures: SVG files that have the same bytes for the same figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]  # an extra: measuring needs no plots
from matplotlib.axes import Axes  # type: ignore[import-not-found, unused-ignore]
from matplotlib.figure import Figure as Picture  # type: ignore[import-not-found, unused-ignore]

from benchmarks.harness.figure import Figure

SALT = "paramserver"
WIDTH, HEIGHT = 8.0, 3.6


def draw(figures: Sequence[Figure], file: Path) -> None:
    """Write a picture of the ratios of a case: over the sizes, or as bars where each case has one size."""
    with mpl.rc_context({"svg.hashsalt": SALT, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        picture = Picture(figsize=(WIDTH, HEIGHT), layout="constrained")
        cases = [list(group) for _, group in itertools.groupby(_sorted(figures), key=lambda figure: figure.case)]
        if any(len(case) > 1 for case in cases):
            units = dict.fromkeys(case[0].size_unit for case in cases if len(case) > 1)
            for axes, unit in zip(picture.subplots(1, len(units), squeeze=False)[0], units, strict=True):
                _lines(axes, [case for case in cases if case[0].size_unit == unit and len(case) > 1], unit)
        else:
            _bars(picture.subplots(), [case[0] for case in cases])
        picture.savefig(file, format="svg", metadata={"Date": None})


def _sorted(figures: Sequence[Figure]) -> list[Figure]:
    return sorted(figures, key=lambda figure: (figure.case, figure.size))


def _lines(axes: Axes, cases: Sequence[Sequence[Figure]], unit: str) -> None:
    for case in cases:
        (line,) = axes.plot([one.size for one in case], [one.ratio for one in case], marker="o", label=case[0].case)
        low, high = ([pick(one.ratios) for one in case] for pick in (min, max))
        axes.fill_between([one.size for one in case], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for size, target in [(one.size, one.target) for one in case if one.target is not None]:
            axes.plot(size, target, marker="_", markersize=18, color=line.get_color())
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes" if unit == "B" else unit)
    axes.set_ylabel("ratio")
    axes.legend(fontsize=7, frameon=False)


def _bars(axes: Axes, figures: Sequence[Figure]) -> None:
    names = [f"{figure.case}\nbeside {figure.beside}" for figure in figures]
    axes.barh(names, [figure.ratio for figure in figures], color="tab:blue")
    for row, figure in enumerate(figures):
        if figure.target is not None:
            axes.plot(figure.target, row, marker="|", markersize=24, color="black")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("ratio")
