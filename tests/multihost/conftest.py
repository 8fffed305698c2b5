"""A network of hosts for each test, on one machine; skipped where the system or the user cannot make it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from tests.multihost.hosts import Network, why_impossible
from tests.multiprocess.conftest import warm, warm_server
from tests.multiprocess.warm import Warm

__all__ = ["warm", "warm_server"]

_why_impossible = functools.cache(why_impossible)


def pytest_runtest_setup() -> None:
    """Skip before torch is imported for nothing."""
    if why := _why_impossible():
        pytest.skip(why)


@pytest.fixture
def network(warm: Warm) -> Iterator[Network]:
    """A network without hosts; they are gone after the test."""
    with Network(warm) as network:
        yield network
