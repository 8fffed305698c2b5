"""The options of a case: a frozen struct, whose fields are the options of its command line.

Rules
    * A field is annotated with its metavar and help, so that it is described once, here.
    * A result that repeats its options inherits from their struct.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import typer

from benchmarks.harness.errors import BenchmarkError

Size = TypeVar("Size", int, str)
"""The size of a case: a number, or the name of a model."""

LANE_NAMES = {"auto": "shared memory", "tcp": "TCP"}
"""The names of lanes in results, by the value of the option ``--lane``."""
LANES = tuple(LANE_NAMES)


class Options(msgspec.Struct, kw_only=True, frozen=True):
    """The time that a measurement takes.

    Attributes:
        seconds: Length of a turn of one side.
        repeats: Number of turns of each side.
    """

    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a turn of one side.")] = 3.0
    repeats: Annotated[int, typer.Option(metavar="R", help="Number of turns of each side.")] = 5

    def __post_init__(self) -> None:
        check_least(self, "repeats")
        if not self.seconds > 0:
            raise BenchmarkError(f"seconds: expected more than 0, got {self.seconds}")


class Effort(Options, kw_only=True, frozen=True):
    """The options of a case that measures several sizes.

    Attributes:
        seconds: Length of a turn of one side.
        sizes: Which sizes are measured: all, the few that tell the most, or the least one.
    """

    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a turn of one side.")] = 0.5

    sizes: Annotated[Literal["all", "few", "least"], typer.Option(help="The sizes that are measured.")] = "all"

    def pick(self, sizes: tuple[Size, ...], few: tuple[Size, ...]) -> tuple[Size, ...]:
        """Return the sizes to measure of all the ascending ``sizes``, of which ``few`` tell the most."""
        return {"all": sizes, "few": few, "least": sizes[:1]}[self.sizes]


QUICK: dict[str, Any] = {"seconds": 0.25, "repeats": 3, "sizes": "few"}
SMOKE: dict[str, Any] = {"seconds": 0.02, "repeats": 1, "sizes": "least"}
"""The least that can be measured: it shows that a case works, and its figures mean nothing."""


def check_least(options: Options, *names: str) -> None:
    """Raise BenchmarkError if one of these options is less than 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise BenchmarkError(f"{name}: expected 1 or more, got {getattr(options, name)}")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise BenchmarkError if an option has none of the known values."""
    if value not in known:
        raise BenchmarkError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
