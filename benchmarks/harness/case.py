"""A case, and where cases are found.

A new case is one module in ``benchmarks/cases``, found by its name. All it needs is a ``CASE``::

    CASE = Case(title="Heading of its table", options=Effort, measure=measure)

where ``measure(options)`` yields a `benchmarks.harness.figure.Figure` for each thing that it has measured. The module's
name then is a command of ``python -m benchmarks``, its figures are part of ``suite`` and ``check``, and the report has
a section with its title.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import torch
from rich.table import Table

import benchmarks.cases
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure
from benchmarks.harness.options import Effort, Options

O = TypeVar("O", bound=Options)  # noqa: E741  # the options of a case


class Line(Protocol):
    """A result of a case, and a line of JSON."""

    @classmethod
    def tables(cls, title: str, lines: Sequence[Any]) -> Iterable[Table]:
        """Return tables of results of this kind."""


@dataclass(frozen=True, kw_only=True)
class Case(Generic[O]):
    """Something that is measured.

    Attributes:
        title: Heading of its figures.
        options: The struct of its options.
        measure: Yields results, as they are made. Blocks. It raises BenchmarkError if a process fails, and
            ParameterServerError if a ps refuses.
        is_in_suite: Whether ``suite`` and ``check`` measure it too; its options then have to be `Effort`.
        order: Its place in the suite and on the page: the lower, the earlier.
        has_one_thread: Whether torch has one thread in the process that measures, as it has in the others.
    """

    title: str
    options: type[O]
    measure: Callable[[O], Iterable[Line]]
    is_in_suite: bool = True
    order: int = 100
    has_one_thread: bool = True


AnyCase = Case[Any]
"""A case with options of any type."""


def find_cases() -> Mapping[str, AnyCase]:
    """Return the cases in the folder ``benchmarks/cases`` by name, in their order.

    Raises:
        BenchmarkError: If a module there has no ``CASE``.
    """
    found = {}
    for module in pkgutil.iter_modules(benchmarks.cases.__path__):
        case = getattr(importlib.import_module(f"benchmarks.cases.{module.name}"), "CASE", None)
        if not isinstance(case, Case):
            raise BenchmarkError(f"benchmarks/cases/{module.name}.py: expected a Case named CASE, got {case!r}")
        found[module.name] = case
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def measure_case(name: str, case: Case[O], options: O) -> Iterator[Line]:
    """Yield the results of a case; figures bear its name."""
    if case.has_one_thread:
        torch.set_num_threads(1)
    for line in case.measure(options):
        yield msgspec.structs.replace(line, benchmark=name) if isinstance(line, Figure) else line


def measure_suite(options: Effort) -> Iterator[Figure]:
    """Yield the figures of all cases of the suite. Blocks for about twelve minutes with all sizes."""
    for name, case in find_cases().items():
        if case.is_in_suite:
            yield from (line for line in measure_case(name, case, options) if isinstance(line, Figure))
