"""The watch of a ps over its workers, one look at a time."""

from __future__ import annotations

import pytest

from paramserver.errors import UnavailableError
from paramserver.server.watch import Watch
from paramserver.store.liveness import Liveness
from paramserver.store.membership import Membership
from paramserver.transport import waiting

CHIEF, WORKER = "chief:0", "worker:0"


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def membership() -> Membership:
    return Membership(CHIEF, [CHIEF, WORKER])


def test_a_silent_worker_expires_and_is_hung_up(
    clock: Clock, membership: Membership, caplog: pytest.LogCaptureFixture
) -> None:
    liveness, hung_up = Liveness(clock), list[str]()
    watch = Watch("ps:0", membership, liveness, hung_up.append)
    membership.join(WORKER, "process.strategy.0")
    liveness.beat(WORKER, "process.strategy.0", 30.0, source=None)
    watch.look()
    clock.now += 31.0
    watch.look()
    watch.look()
    assert hung_up == ["process.strategy.0"]
    assert [message for message in caplog.messages if "worker:0" in message] == [
        "ps:0 has not heard of worker:0 for 30 s: it counts as lost; is it stopped, or its network down?"
    ]
    with pytest.raises(UnavailableError):
        membership.join(WORKER, "process.strategy.0")


def test_a_ps_says_whom_it_waits_for(
    clock: Clock, membership: Membership, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(waiting, "FIRST_AFTER", 0.0)  # every look says it
    watch = Watch("ps:0", membership, Liveness(clock), lambda _: None)
    watch.look()
    assert "ps:0 waits for chief:0, worker:0 since" in caplog.messages[-1]
    membership.join(WORKER, "process.strategy.0")
    count = len(caplog.messages)
    watch.look()
    assert len(caplog.messages) == count, "somebody trains"
