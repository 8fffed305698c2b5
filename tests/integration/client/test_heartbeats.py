"""Signs of life: silent ps tasks, silent workers, and the connections that they cost."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from tests.patience import patience

from paramserver.client.heartbeats import Heartbeats
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import UnavailableError
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.frames import FrameSocket
from paramserver.transport.handshake import connect_heartbeats
from paramserver.transport.identity import Identity, new_incarnation
from paramserver.transport.in_process import InProcessLane, InProcessSession
from paramserver.transport.lane import Lane
from paramserver.wire.messages import Done, GetStatus, Heartbeat

PATIENCE = patience(20)
SOON = 0.2
LONG = 600.0


class Closing(InProcessLane):
    """A lane that tells of its end."""

    def __init__(self) -> None:
        super().__init__("ps:0", InProcessSession("worker:0", "once"), lambda *_: None)
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def ends() -> Iterator[tuple[FrameSocket, FrameSocket]]:
    ours, theirs = map(FrameSocket, socket.socketpair(), ("ps:0", "worker:0"))
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_silent_ps_counts_as_lost(ends: tuple[FrameSocket, FrameSocket], caplog: pytest.LogCaptureFixture) -> None:
    heartbeats, lane = Heartbeats(SOON), Closing()
    heartbeats.watch(0, ends[0], lane)
    assert lane.closed.wait(PATIENCE)
    assert heartbeats.silence(0) == "ps:0 has given no sign of life for 0.2 s, and counts as lost"
    assert "ps:0 has given no sign of life for 0.2 s" in caplog.text
    heartbeats.close()


def test_a_ps_that_answers_is_alive(ends: tuple[FrameSocket, FrameSocket]) -> None:
    heartbeats, lane = Heartbeats(SOON), Closing()
    heartbeats.watch(0, ends[0], lane)
    for _ in range(12):  # twice as many as in the time limit
        assert isinstance(ends[1].receive(), Heartbeat)
        ends[1].send(Done())
    assert not lane.closed.is_set()
    assert heartbeats.silence(0) == ""
    heartbeats.close()


def test_the_end_of_the_connection_is_no_silence(ends: tuple[FrameSocket, FrameSocket]) -> None:
    heartbeats, lane = Heartbeats(SOON), Closing()
    heartbeats.watch(0, ends[0], lane)
    ends[1].close()
    assert not lane.closed.wait(3 * SOON)
    assert heartbeats.silence(0) == ""
    heartbeats.close()


def test_a_ps_that_is_back_is_watched_anew(ends: tuple[FrameSocket, FrameSocket]) -> None:
    heartbeats, lane = Heartbeats(SOON), Closing()
    heartbeats.watch(0, ends[0], lane)
    assert lane.closed.wait(PATIENCE)
    ours, theirs = map(FrameSocket, socket.socketpair(), ("ps:0", "worker:0"))
    heartbeats.watch(0, ours, Closing())
    assert heartbeats.silence(0) == ""
    heartbeats.close()
    theirs.close()


def _ask_for_ever(lane: Lane) -> None:
    while True:
        lane.start(GetStatus())
        lane.finish()


def test_a_silent_worker_counts_as_lost_and_its_connections_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with LocalCluster(ps=1, workers=2, token="right") as cluster:
        client = cluster.client("worker:0")
        (lane,) = client.lanes.each()
        assert client.status()[0].joined == ("worker:0",)
        dialer = client.lanes.dialer
        dialer.close()  # type: ignore[union-attr]  # it has one; its own signs of life end with this
        address = cluster.spec.address(TaskId(Role.PS, 0))
        silent = connect_heartbeats(address, "ps:0", dialer.me, timeout=PATIENCE, limit=SOON)  # type: ignore[union-attr]
        with pytest.raises(UnavailableError):
            _ask_for_ever(lane)
        assert "ps:0 has not heard of worker:0 for 0.2 s: it counts as lost" in caplog.text
        chief = cluster.client("chief:0")
        assert chief.status()[0].joined == ("chief:0",)
        silent.close()


def test_what_a_lost_worker_still_sends_is_refused_until_it_comes_back() -> None:
    with LocalCluster(ps=1, workers=2, token="right") as cluster:
        client = cluster.client("worker:0")
        incarnation = client.lanes.dialer.me.incarnation  # type: ignore[union-attr]
        server = cluster.servers[0]
        server._membership.expire(incarnation)
        server._host.hang_up(incarnation)
        with pytest.raises(UnavailableError):
            client.status()
        with pytest.raises(UnavailableError, match="what it still sends is refused"):
            client.status()
        lanes = client.lanes.dialer.dial_all(PATIENCE)  # type: ignore[union-attr]
        client.lanes.replace(lanes)
        assert client.status()[0].joined == ("worker:0",)


def test_the_newer_of_two_processes_of_one_task_takes_part() -> None:
    with LocalCluster(ps=1, workers=2, token="right") as cluster:
        older, newer = cluster.client("worker:0"), cluster.client("worker:0")
        assert newer.status()[0].joined == ("worker:0",)
        with pytest.raises(UnavailableError):
            older.status()
        with pytest.raises(UnavailableError, match="another connection has taken its place"):
            older.status()
        assert newer.status()[0].joined == ("worker:0",)


def test_a_heartbeat_connection_takes_no_part() -> None:
    with LocalCluster(ps=1, workers=2, token="right") as cluster:
        me = Identity(task="worker:0", token="right", incarnation=new_incarnation())
        address = cluster.spec.address(TaskId(Role.PS, 0))
        frames = connect_heartbeats(address, "ps:0", me, timeout=PATIENCE, limit=LONG)
        frames.send(Heartbeat())
        assert frames.receive() == Done()
        assert cluster.client("chief:0").status()[0].joined == ("chief:0",)
        frames.close()
