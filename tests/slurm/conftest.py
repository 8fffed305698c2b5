"""One Slurm for all tests, skipped where the system or the user cannot make it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from tests.slurm.daemons import Slurm, why_missing

_why_missing = functools.cache(why_missing)


def pytest_runtest_setup() -> None:
    """Skip with a reason."""
    if why := _why_missing():
        pytest.skip(why)


@pytest.fixture(scope="session")
def daemons() -> Iterator[Slurm]:
    """The daemons; they are gone after the tests."""
    with Slurm() as slurm:
        yield slurm


@pytest.fixture
def slurm(daemons: Slurm) -> Iterator[Slurm]:
    """A Slurm without jobs."""
    yield daemons
    daemons.clean_up()
