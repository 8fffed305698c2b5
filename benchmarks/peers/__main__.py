"""``python -m benchmarks.peers``: global steps/s of paramserver beside what people use instead, in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.models import LANES, MODELS
from benchmarks.peers.catalogue import PEERS, WORKERS
from benchmarks.peers.comparison import Comparison, compare
from benchmarks.peers.environments import NotInstalledError, interpreter, versions
from benchmarks.processes import BenchmarkError
from benchmarks.step import StepOptions, check_choice, fail

app = typer.Typer(add_completion=False)


@app.command()
def install() -> None:
    """Make the environments of all peers. The exit code is 1 if one of them could not be made."""
    failed = False
    for name, peer in PEERS.items():
        try:
            with Console(stderr=True).status(f"installing {name}"):
                interpreter(peer.environment)
        except NotInstalledError as error:
            failed = True
            typer.echo(f"error: {error}", err=True)
        else:
            typer.echo(f"{name}: {_text(versions(peer.environment, peer.packages))}")
    if failed:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(metavar="|".join(MODELS), help="What is trained; all.")] = None,
    peer: Annotated[list[str] | None, typer.Option(metavar="|".join(PEERS), help="Beside whom; all.")] = None,
    lane: Annotated[str, typer.Option(metavar="|".join(LANES), help="Of paramserver.")] = "auto",
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a window.")] = 3.0,
    repeats: Annotated[int, typer.Option(metavar="R", help="How many pairs of windows.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each result instead.")] = False,
) -> None:
    """Measure; what is not installed is installed. A peer that fails is a result, and the exit code is 0."""
    if context.invoked_subcommand:
        return
    try:
        wanted = {
            one: StepOptions(model=one, lane=lane, workers=WORKERS, threads=WORKERS, seconds=seconds, repeats=repeats)
            for one in model or MODELS
        }
        plans = [(name, wanted[one]) for one, name in pairs(wanted, peer or PEERS)]
    except BenchmarkError as error:
        raise fail(error) from error
    results = []
    for name, options in plans:
        with Console(stderr=True).status(f"measuring {options.model} beside {name}"):
            results.append(compare(name, options))
        if as_json:
            print_json(results[-1])
    if not as_json:
        print_results(results)


def pairs(models: Iterable[str], peers: Iterable[str]) -> list[tuple[str, str]]:
    """Each model with each of the peers that train it.

    Raises:
        BenchmarkError: If there is no such peer, or none of them trains any of the models.
    """
    wanted, known = list(models), list(peers)
    for name in known:
        check_choice("peer", name, PEERS)
    found = [(model, name) for model in wanted for name in known if model in PEERS[name].models]
    if not found:
        trained = sorted({model for name in known for model in PEERS[name].models})
        raise BenchmarkError(f"model: expected one that {', '.join(known)} trains ({', '.join(trained)}), got {wanted}")
    return found


def print_json(result: Comparison) -> None:
    """A line of JSON as the other benchmarks print it; what was not measured is told to stderr."""
    if result.failure:
        typer.echo(_not_measured(result), err=True)
    else:
        typer.echo(msgspec.json.encode(result.figure()))


def print_results(results: Sequence[Comparison]) -> None:
    """Show the results to people, and which peers have none."""
    console = Console()
    console.print(table([result for result in results if not result.failure]))
    for result in results:
        if result.failure:
            console.print(_not_measured(result), markup=False)


def table(results: Iterable[Comparison]) -> Table:
    """The measurements for people."""
    shown = Table(title="steps/s of all workers, beside others in the same run")
    for column in ("model", "lane", "peer", "versions"):
        shown.add_column(column)
    for column in ("steps/s", "peer's", "ratio", "ratios"):
        shown.add_column(column, justify="right")
    for result in results:
        shown.add_row(
            result.model,
            result.lane,
            result.peer,
            _text(result.versions),
            f"{result.steps_per_second:,.4g}",
            f"{result.peer_steps_per_second:,.4g}",
            f"{result.ratio:.2f}",
            f"{min(result.ratios):.2f}-{max(result.ratios):.2f}",
        )
    shown.caption = f"{WORKERS} workers and 1 ps, one thread each; ratio: paramserver's steps/s to the peer's"
    return shown


def _not_measured(result: Comparison) -> str:
    return f"{result.peer}, {result.model}: NOT MEASURED: {result.failure}"


def _text(installed: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"


if __name__ == "__main__":
    app()
