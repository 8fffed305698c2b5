"""``python -m benchmarks report RESULTS.jsonl``: write the tables and pictures of docs/performance.md.

The text between the page's two markers is replaced, all other text is kept. The pictures need matplotlib.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import ROOT
from benchmarks.harness.case import find_cases
from benchmarks.harness.errors import BenchmarkError, errors_for_people
from benchmarks.harness.figure import COLUMNS, Figure, read

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def results(figures: Sequence[Figure], pictures: str) -> str:
    """Return the Markdown of all figures: promises, then each case with its picture in folder ``pictures``."""
    titles = {name: case.title for name, case in find_cases().items()}
    promised = [figure for figure in figures if figure.target is not None]
    parts = ["## What was promised", markdown_table(promised)]
    for benchmark, group in by_benchmark(figures).items():
        title = titles.get(benchmark, benchmark)
        parts += [f"## {title}", f"![{title}]({pictures}/{benchmark}.svg)", markdown_table(group)]
    return "\n\n".join(parts)


def markdown_table(figures: Iterable[Figure]) -> str:
    """Return the figures as a table of Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(figure.cells() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_benchmark(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Return the figures of each case, in the order in which they were measured."""
    groups = itertools.groupby(figures, key=lambda figure: figure.benchmark)
    return {benchmark: list(group) for benchmark, group in groups}


def replaced(page: str, content: str) -> str:
    """Return the page with other content between its markers.

    Raises:
        BenchmarkError: If it does not have both of them, once and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"the page must hold {BEGIN} and, after it, {END}; put them where the results belong")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


@errors_for_people()
def main(
    file: Annotated[Path, typer.Argument(metavar="RESULTS.jsonl", help="Figures that were printed with --json.")],
    page: Annotated[Path, typer.Option(metavar="FILE", help="The page to write into.")] = PAGE,
) -> None:
    """Write the tables and pictures of the page about performance."""
    from benchmarks.harness.plots import draw  # here, so that the tables are tested where matplotlib is not installed

    pictures = page.with_suffix("")
    figures = list(read(file.read_bytes().splitlines()))
    text = replaced(page.read_text(), results(figures, pictures.name))
    pictures.mkdir(exist_ok=True)
    for benchmark, group in by_benchmark(figures).items():
        draw(group, pictures / f"{benchmark}.svg")
    page.write_text(text)
