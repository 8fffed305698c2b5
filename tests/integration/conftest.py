"""What several tests of whole clusters in one process share."""

from __future__ import annotations

import pytest

from paramserver.transport import identity


@pytest.fixture
def each_strategy_is_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that is made later stands for a task that was started again, not for a second one of its process."""
    monkeypatch.setattr(identity, "_process_name", lambda _: identity.new_process())


@pytest.fixture(params=["auto", "tcp"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each lane in turn, also for strategies, which find it in the environment."""
    monkeypatch.setenv("PARAMSERVER_LANE", request.param)
    return str(request.param)
