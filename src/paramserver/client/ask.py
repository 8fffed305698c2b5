"""Questions to ps tasks, each with the kind of reply that it expects: any other is an error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from paramserver.client.exchange import Call, Exchange
from paramserver.errors import DeadlineError
from paramserver.transport.lane import Lane
from paramserver.wire import messages
from paramserver.wire.refusals import expect

WAIT_INTERVAL = 1.0
"""Seconds after which a ps answers a wait, so that a connection never looks dead while it waits."""

R = TypeVar("R", bound=messages.Message)
OnWait = Callable[[float], None]


class Patience:
    """How long to wait for the chief, from now on and for everything together.

    Args:
        timeout: Seconds.
        on_wait: Called about every second with the seconds that were waited so far.
    """

    def __init__(self, timeout: float, on_wait: OnWait = lambda _: None) -> None:
        self._timeout = timeout
        self._on_wait = on_wait
        self._begun = time.monotonic()

    def interval(self) -> float:
        """Seconds for which a ps may be asked to wait."""
        return min(WAIT_INTERVAL, max(self._timeout - self._waited(), 0.0))

    def wait_on(self, failing: str) -> None:
        """What was waited for is not there yet; `failing` says so.

        Raises:
            DeadlineError: If the time is over.
        """
        waited = self._waited()
        if waited >= self._timeout:
            raise DeadlineError(
                f"{failing} within {self._timeout:g} s; is it running? (session_creation_timeout_secs)", self._timeout
            )
        self._on_wait(waited)

    def _waited(self) -> float:
        return time.monotonic() - self._begun


def ask(lanes: Exchange, lane: Lane, request: messages.Request, kind: type[R]) -> R:
    """Ask one ps, and wait for its reply."""
    return ask_each(lanes, [Call(lane, request)], kind)[0]


def ask_all(lanes: Exchange, request: messages.Request, kind: type[R]) -> list[R]:
    """Ask every ps the same; their replies, by the index of the ps."""
    return ask_each(lanes, [Call(lane, request) for lane in lanes.each()], kind)


def ask_each(lanes: Exchange, calls: Sequence[Call], kind: type[R]) -> list[R]:
    """Ask several ps tasks at once; their replies, in the order of the calls."""
    return expected(calls, lanes.run(calls).replies, kind)


def expected(calls: Sequence[Call], replies: Sequence[messages.Reply], kind: type[R]) -> list[R]:
    """The replies to these calls, all of which are of a kind.

    Raises:
        ParameterServerError: What a ps has refused with; the first one that did.
        RemoteProtocolError: If a ps has answered something else.
    """
    return [expect(reply, kind, call.lane.task) for call, reply in zip(calls, replies, strict=True)]


def ask_until_ready(
    lanes: Exchange, lane: Lane, request: Callable[[float], messages.Request], patience: Patience, failing: str
) -> None:
    """Ask a ps again and again until it says that what was asked for is there.

    Args:
        lanes: To all ps tasks.
        lane: To this one.
        request: From the seconds after which it is to be answered in any case.
        patience: How long to go on.
        failing: What is the matter as long as it is not there, for the message.

    Raises:
        DeadlineError: If it is not there in time.
        RefusedError: If the chief failed.
    """
    while not ask(lanes, lane, request(patience.interval()), messages.State).ready:
        patience.wait_on(failing)
