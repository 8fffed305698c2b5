"""The error of a measurement, and how commands show errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import typer

from paramserver.errors import ParameterServerError


class BenchmarkError(Exception):
    """A measurement could not be made; the message says why."""


@contextlib.contextmanager
def errors_for_people() -> Iterator[None]:
    """Print an error of a block or function for people, and exit with 1."""
    try:
        yield
    except (BenchmarkError, ParameterServerError, msgspec.DecodeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
