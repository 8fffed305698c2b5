"""The command line: a command for each case, and those that deal with all of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
import typer
from rich.console import Console

from benchmarks.harness import check, report
from benchmarks.harness.case import Line, find_cases, measure_case, measure_suite
from benchmarks.harness.errors import errors_for_people
from benchmarks.harness.options import QUICK, SMOKE, Effort, Options

O = TypeVar("O", bound=Options)  # noqa: E741  # the options of a command

AsJson = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each result instead of tables.")]
Quick = Annotated[bool, typer.Option("--quick", help="Measure fewer sizes, in shorter and fewer turns.")]
Smoke = Annotated[bool, typer.Option("--smoke", hidden=True)]


def app() -> typer.Typer:
    """Return the command line of the cases that there are."""
    made = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        help="Measure speed and memory, each figure beside something plain in the same session.",
    )
    for name, case in find_cases().items():
        add(made, name, case.title, case.options, partial(measure_case, name, case))
    add(made, "suite", "All cases of the suite, one after the other", Effort, measure_suite)
    made.command("check")(check.main)
    made.command("report")(report.main)
    return made


def add(to: typer.Typer, name: str, title: str, options: type[O], measure: Callable[[O], Iterable[Line]]) -> None:
    """Add a command that measures and prints, with an option for each field of ``options``."""

    @errors_for_people()
    def run(*, as_json: bool, quick: bool = False, smoke: bool = False, **given: Any) -> None:
        measured = measure(options(**{**given, **(SMOKE if smoke else QUICK if quick else {})}))
        if as_json:
            print_json(measured)
        else:
            print_tables(title, measured)

    run.__signature__ = _signature(options)  # type: ignore[attr-defined]  # typer reads the options from it
    to.command(name, help=f"{title}.")(run)


def print_json(lines: Iterable[Line]) -> None:
    """Print a line of JSON for each result, as soon as there is one."""
    for line in lines:
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()


def print_tables(title: str, lines: Iterable[Line]) -> None:
    """Print all results as tables."""
    with Console(stderr=True).status(f"measuring: {title}"):
        measured = list(lines)
    if measured:
        Console().print(*measured[0].tables(title, measured))


def _signature(options: type[Options]) -> inspect.Signature:
    """Return the parameters of a command: the fields of ``options``, and flags."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [(field.name, hints[field.name], _default(field)) for field in msgspec.structs.fields(options)]
    flags = {"quick": Quick, "smoke": Smoke} if issubclass(options, Effort) else {}
    parameters += [(flag, hint, False) for flag, hint in {**flags, "as_json": AsJson}.items()]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [inspect.Parameter(name, keyword, default=default, annotation=hint) for name, hint, default in parameters]
    )


def _default(field: msgspec.structs.FieldInfo) -> object:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
