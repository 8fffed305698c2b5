"""``python -m benchmarks.peers``: global steps/s of paramserver beside other ways to train, in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cases.step import StepOptions
from benchmarks.harness.command import command
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import spread, table
from benchmarks.harness.options import LANES, Options, check_choice
from benchmarks.models.catalogue import MODELS
from benchmarks.peers.catalogue import PEERS, WORKERS
from benchmarks.peers.comparison import Comparison, compare
from benchmarks.peers.environments import as_text


class PeerOptions(Options, kw_only=True, frozen=True):
    """The models and peers that are measured; an empty list stands for all.

    Attributes:
        model: Names of models.
        peer: Names of peers.
        lane: The lane of paramserver.
    """

    model: Annotated[list[str], typer.Option(metavar="|".join(MODELS), help="A model that is trained; all.")] = (
        msgspec.field(default_factory=list)
    )
    peer: Annotated[list[str], typer.Option(metavar="|".join(PEERS), help="A peer to measure; all.")] = msgspec.field(
        default_factory=list
    )
    lane: Annotated[str, typer.Option(metavar="|".join(LANES), help="The lane of paramserver.")] = "auto"


def measure(options: PeerOptions) -> Iterator[Comparison]:
    """Measure each model beside each peer that trains it; a peer that fails is a result, too.

    Raises:
        BenchmarkError: If the options do not fit.
    """
    base = StepOptions(
        lane=options.lane, workers=WORKERS, threads=WORKERS, seconds=options.seconds, repeats=options.repeats
    )
    for model, name in pairs(options.model or MODELS, options.peer or PEERS):
        with Console(stderr=True).status(f"measuring {model} beside {name}"):
            yield compare(name, msgspec.structs.replace(base, model=model))


def pairs(models: Iterable[str], peers: Iterable[str]) -> list[tuple[str, str]]:
    """Return each model with each of the peers that train it.

    Raises:
        BenchmarkError: If there is no such model or peer, or none of the peers trains any of the models.
    """
    wanted, known = list(models), list(peers)
    for model in wanted:
        check_choice("model", model, MODELS)
    for name in known:
        check_choice("peer", name, PEERS)
    found = [(model, name) for model in wanted for name in known if model in PEERS[name].models]
    if not found:
        trained = sorted({model for name in known for model in PEERS[name].models})
        raise BenchmarkError(f"model: expected one that {', '.join(known)} trains ({', '.join(trained)}), got {wanted}")
    return found


def print_json(results: Iterable[Comparison]) -> None:
    """Print a line of JSON for each result, as other benchmarks do; failures go to stderr."""
    for result in results:
        if result.failure:
            typer.echo(_not_measured(result), err=True)
        else:
            typer.echo(msgspec.json.encode(result.figure()))


def print_results(results: Iterable[Comparison]) -> None:
    """Print the results for people, and the peers that have none."""
    measured = list(results)
    console = Console()
    console.print(result_table([result for result in measured if not result.failure]))
    for result in measured:
        if result.failure:
            console.print(_not_measured(result), markup=False)


def result_table(results: Sequence[Comparison]) -> Table:
    """Return the measurements for people."""
    numbers = ("steps/s", "peer's", "ratio", "ratios")
    rows = (
        (
            result.model,
            result.lane,
            result.peer,
            as_text(result.versions),
            f"{result.steps_per_second:,.4g}",
            f"{result.peer_steps_per_second:,.4g}",
            f"{result.ratio:.2f}",
            spread(result.ratios),
        )
        for result in results
    )
    return table(
        "steps/s of all workers, beside others in the same run",
        ("model", "lane", "peer", "versions", *numbers),
        rows,
        right=numbers,
        caption=f"{WORKERS} workers and 1 ps, one thread each; ratio: paramserver's steps/s to the peer's",
    )


def _not_measured(result: Comparison) -> str:
    return f"{result.peer}, {result.model}: NOT MEASURED: {result.failure}"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(help="Measure beside peers; a peer that is not installed is installed, one that fails is a result.")(
        command(PeerOptions, measure, as_lines=print_json, as_tables=print_results)
    )
    app()
