"""One cluster of Ray for all tests, skipped where Ray is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.ray.fleet import Fleet

collect_ignore = ["nodes.py"]  # a program that imports Ray, which is collected where docstrings are tests, too


def pytest_runtest_setup() -> None:
    """Skip with a reason."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed; make test-ray has an environment with it")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Fleet]:
    """The cluster; it is gone after the tests."""
    with Fleet() as fleet:
        yield fleet


@pytest.fixture
def fleet(cluster: Fleet) -> Iterator[Fleet]:
    """A cluster without runs."""
    yield cluster
    cluster.clean_up()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a program, and returns its path."""

    def write(*parts: str, name: str = "train.py") -> str:
        path = tmp_path / name
        path.write_text("\n".join(parts))
        return str(path)

    return write
