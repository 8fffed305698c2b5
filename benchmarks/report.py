"""``python -m benchmarks.report RESULTS.jsonl``: writes the tables and pictures of docs/performance.md.

The page's own text stays; what lies between the two markers is replaced. The pictures need matplotlib.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from benchmarks.figure import COLUMNS, Figure, read
from benchmarks.processes import ROOT, BenchmarkError
from benchmarks.step import fail

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

TITLES = {
    "null": "A step without compute",
    "lanes": "What goes through a lane",
    "training": "Training",
    "peers": "Beside other ways to train",
    "growth": "More variables and more workers",
    "latency": "A connection that takes its time",
    "startup": "From nothing to the first step",
}


def results(figures: Sequence[Figure], pictures: str) -> str:
    """The Markdown of all figures: what was promised, then each benchmark with its picture in folder ``pictures``."""
    promised = [figure for figure in figures if figure.target is not None]
    parts = ["## What was promised", markdown_table(promised)]
    for benchmark, group in by_benchmark(figures).items():
        title = TITLES.get(benchmark, benchmark)
        parts += [f"## {title}", f"![{title}]({pictures}/{benchmark}.svg)", markdown_table(group)]
    return "\n\n".join(parts)


def markdown_table(figures: Iterable[Figure]) -> str:
    """The figures as a table of Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(figure.cells() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_benchmark(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """The figures of each benchmark, in the order in which they were measured."""
    groups = itertools.groupby(figures, key=lambda figure: figure.benchmark)
    return {benchmark: list(group) for benchmark, group in groups}


def replaced(page: str, content: str) -> str:
    """The page with other content between its markers.

    Raises:
        BenchmarkError: If it does not have both of them, once and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"the page must hold {BEGIN} and, after it, {END}; put them where the results belong")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main(
    file: Annotated[Path, typer.Argument(metavar="RESULTS.jsonl", help="What a benchmark printed with --json.")],
    page: Annotated[Path, typer.Option(metavar="FILE", help="The page to write into.")] = PAGE,
) -> None:
    """Write the tables and pictures of the page about performance."""
    from benchmarks.plots import draw  # here, so that the tables are tested where matplotlib is not installed

    pictures = page.with_suffix("")
    try:
        figures = list(read(file.read_bytes().splitlines()))
        text = replaced(page.read_text(), results(figures, pictures.name))
        pictures.mkdir(exist_ok=True)
        for benchmark, group in by_benchmark(figures).items():
            draw(group, pictures / f"{benchmark}.svg")
        page.write_text(text)
    except (BenchmarkError, msgspec.DecodeError, OSError) as error:
        raise fail(error) from error


if __name__ == "__main__":
    typer.run(main)
