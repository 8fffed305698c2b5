"""Waiting for a message: asleep, or for a moment by looking."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from paramserver.transport import arrival
from paramserver.transport.arrival import SHORT, Arrival

FOR_EVER = None
LOOK = 0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


class Waits:
    """An `Arrival` whose time is told: how long each call of ``poll`` takes, and what it finds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, near: socket.socket) -> None:
        self._now = 0.0
        self._coming: list[tuple[float, bool]] = []
        self.calls: list[float | None] = []
        monkeypatch.setattr(arrival.time, "perf_counter", lambda: self._now)
        self._arrival = Arrival(near)
        monkeypatch.setattr(self._arrival, "_poll", self._poll)

    def wait(self, *coming: tuple[float, bool], seconds: float = 0) -> tuple[bool, list[float | None]]:
        """Wait while ``poll`` takes and finds this; what came of it, and the time limits it was called with."""
        self._coming, self.calls = list(coming), []
        return self._arrival.wait(seconds), self.calls

    def _poll(self, limit: float | None) -> bool:
        self.calls.append(limit)
        taken, found = self._coming.pop(0)
        self._now += taken
        return found


def test_what_is_there_or_has_ended_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    waiting = Arrival(near)
    assert not waiting.wait(0.001)
    far.send(b"x")
    assert waiting.wait(0)
    assert near.recv(9) == b"x"
    assert not waiting.wait(0.001)
    far.close()
    assert waiting.wait(0)


def test_the_first_wait_and_any_after_a_long_one_sleeps(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    waits = Waits(monkeypatch, pair[0])
    long = (2 * SHORT, True)
    assert waits.wait(long) == (True, [FOR_EVER])
    assert waits.wait(long, seconds=5) == (True, [5000])


def test_after_a_short_wait_one_looks_until_something_comes(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    waits = Waits(monkeypatch, pair[0])
    waits.wait((SHORT / 2, True))
    nothing, something = (SHORT / 4, False), (SHORT / 4, True)
    for _ in range(2):
        assert waits.wait(nothing, nothing, something) == (True, [LOOK] * 3)


def test_who_has_looked_for_long_enough_sleeps_and_does_not_look_the_next_time(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    waits = Waits(monkeypatch, pair[0])
    waits.wait((SHORT / 2, True))
    assert waits.wait((SHORT, False), (0, True)) == (True, [LOOK, FOR_EVER])
    assert waits.wait((0, True)) == (True, [FOR_EVER])


def test_a_time_limit_ends_a_wait_that_has_begun_with_looking(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    waits = Waits(monkeypatch, pair[0])
    waits.wait((SHORT / 2, True))
    assert waits.wait((SHORT, False), (5, False), seconds=5) == (False, [LOOK, 5000])
