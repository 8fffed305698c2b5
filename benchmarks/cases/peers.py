"""Training beside other ways to train (see `benchmarks.peers`): the global steps/s of both, in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
import typer

from benchmarks.harness.case import Case
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure
from benchmarks.harness.options import LANES, Options, check_choice
from benchmarks.models.catalogue import MODELS
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.comparison import compare
from paramserver.errors import ParameterServerError


class PeerOptions(Options, kw_only=True, frozen=True):
    """The models and peers that are measured; an empty list stands for all.

    Attributes:
        model: Names of models.
        peer: Names of peers.
        lane: The lane of paramserver.
    """

    model: Annotated[list[str], typer.Option(metavar="|".join(MODELS), help="Models that are trained; all.")] = (
        msgspec.field(default_factory=list)
    )
    peer: Annotated[list[str], typer.Option(metavar="|".join(PEERS), help="Peers to measure; all.")] = msgspec.field(
        default_factory=list
    )
    lane: Annotated[str, typer.Option(metavar="|".join(LANES), help="The lane of paramserver.")] = "auto"

    def __post_init__(self) -> None:
        check_choice("lane", self.lane, LANES)
        super().__post_init__()


def measure(options: PeerOptions) -> Iterator[Figure]:
    """Measure each model beside each peer that trains it; install peers that are not installed.

    A peer that cannot be installed or does not run has no figure; the reason is printed to standard error.
    """
    for model, peer in pairs(options.model or MODELS, options.peer or PEERS):
        try:
            yield compare(peer, model, options.lane, options)
        except (BenchmarkError, ParameterServerError) as error:
            typer.echo(f"{peer}, {model}: NOT MEASURED: {error}", err=True)


def pairs(models: Iterable[str], peers: Iterable[str]) -> list[tuple[str, str]]:
    """Return each model with each of the peers that train it.

    Raises:
        BenchmarkError: If there is no such model or peer, or none of the peers trains any of the models.
    """
    wanted, known = list(models), list(peers)
    for model in wanted:
        check_choice("model", model, MODELS)
    for peer in known:
        check_choice("peer", peer, PEERS)
    found = [(model, peer) for model in wanted for peer in known if model in PEERS[peer].models]
    if not found:
        trained = sorted({model for peer in known for model in PEERS[peer].models})
        raise BenchmarkError(f"model: expected one that {', '.join(known)} trains ({', '.join(trained)}), got {wanted}")
    return found


CASE = Case(title="Beside other ways to train", options=PeerOptions, measure=measure, order=70, is_in_suite=False)
