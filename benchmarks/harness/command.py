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
L = TypeVar("L")  # its results

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
        tables = partial(print_tables, case.title)
        made.command(name, help=f"{case.title}.")(
            command(case.options, partial(measure_case, name, case), print_json, tables)
        )
    made.command("suite", help="All cases of the suite, one after the other.")(
        command(Effort, measure_suite, print_json, partial(print_tables, "Every figure, each beside something plain"))
    )
    made.command("check")(check.main)
    made.command("report")(report.main)
    return made


def command(
    options: type[O],
    measure: Callable[[O], Iterable[L]],
    as_lines: Callable[[Iterable[L]], None],
    as_tables: Callable[[Iterable[L]], None],
) -> Callable[..., None]:
    """Return a command for typer that measures and prints, with an option for each field of ``options``."""
    presets = {"quick": (Quick, QUICK), "smoke": (Smoke, SMOKE)} if issubclass(options, Effort) else {}

    @errors_for_people()
    def run(*, as_json: bool, **given: Any) -> None:
        for preset, (_, values) in presets.items():
            given |= values if given.pop(preset) else {}
        (as_lines if as_json else as_tables)(measure(options(**given)))

    hints = get_type_hints(options, include_extras=True)
    parameters = {field.name: (hints[field.name], _default(field)) for field in msgspec.structs.fields(options)}
    parameters |= {preset: (hint, False) for preset, (hint, _) in presets.items()}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads the options from it
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (hint, default) in {**parameters, "as_json": (AsJson, False)}.items()
        ]
    )
    return run


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


def _default(field: msgspec.structs.FieldInfo) -> object:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
