"""Questions to ps tasks, each with its expected kind of reply; any other reply is an error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from paramserver.client.exchange import Call, Exchange
from paramserver.errors import DeadlineError
from paramserver.transport.lane import Lane
from paramserver.transport.waiting import WaitLog
from paramserver.wire import messages
from paramserver.wire.refusals import expect

WAIT_INTERVAL = 1.0
"""Seconds after which a ps answers a waiting request, so that a connection never looks dead during a wait."""

R = TypeVar("R", bound=messages.Message)
OnWait = Callable[[float], None]


class Patience:
    """A time limit for waiting for the chief, which starts now and covers all waits together.

    Args:
        timeout: Seconds.
        on_wait: Called about every second with the seconds waited so far.
        clock: Returns seconds that never decrease.
    """

    def __init__(
        self, timeout: float, on_wait: OnWait = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout = timeout
        self._on_wait = on_wait
        self._log = WaitLog("this task", timeout, clock=clock)
        self._clock = clock
        self._begun = clock()

    def interval(self) -> float:
        """Return the seconds for which a ps may be asked to wait."""
        return min(WAIT_INTERVAL, max(self._timeout - self._waited(), 0.0))

    def wait_on(self, failing: str) -> None:
        """Check the time limit after a wait in vain, call ``on_wait``, and log the wait if it takes long.

        Args:
            failing: The message about the missing thing, without the time.

        Raises:
            DeadlineError: If the time is over.
        """
        waited = self._waited()
        if waited >= self._timeout:
            raise DeadlineError(
                f"{failing} within {self._timeout:g} s; is it running? (session_creation_timeout_secs)", self._timeout
            )
        self._log.say("the chief", failing)
        self._on_wait(waited)

    def _waited(self) -> float:
        return self._clock() - self._begun


def ask(lanes: Exchange, lane: Lane, request: messages.Request, kind: type[R]) -> R:
    """Ask one ps, and return its reply."""
    return ask_each(lanes, [Call(lane, request)], kind)[0]


def ask_all(lanes: Exchange, request: messages.Request, kind: type[R]) -> list[R]:
    """Ask every ps the same, and return the replies by the index of the ps."""
    return ask_each(lanes, [Call(lane, request) for lane in lanes.each()], kind)


def ask_each(lanes: Exchange, calls: Sequence[Call], kind: type[R]) -> list[R]:
    """Ask several ps tasks at once, and return the replies in the order of the calls."""
    return expected(calls, lanes.run(calls).replies, kind)


def expected(calls: Sequence[Call], replies: Sequence[messages.Reply], kind: type[R]) -> list[R]:
    """Return the replies to these calls, after a check that all are of the expected kind.

    Raises:
        ParameterServerError: If a ps refused; the error of the first one.
        RemoteProtocolError: If a ps sent another kind of reply.
    """
    return [expect(reply, kind, call.lane.task) for call, reply in zip(calls, replies, strict=True)]


def ask_until_ready(
    lanes: Exchange, lane: Lane, request: Callable[[float], messages.Request], patience: Patience, failing: str
) -> None:
    """Ask a ps again and again until it answers that it is ready.

    Args:
        lanes: The lanes to all ps tasks.
        lane: The lane to this ps.
        request: Makes the request from the seconds within which the ps has to answer.
        patience: The time limit.
        failing: The message about the missing thing, for the error.

    Raises:
        DeadlineError: If the ps is not ready in time.
        RefusedError: If the chief failed.
    """
    while not ask(lanes, lane, request(patience.interval()), messages.State).ready:
        patience.wait_on(failing)
