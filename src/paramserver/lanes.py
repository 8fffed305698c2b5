"""The lanes to all parameter servers of a run, asked and answered together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from paramserver.errors import LocalProtocolError, ParameterServerError
from paramserver.transport.lane import Lane, Piece
from paramserver.wire import messages

logger = logging.getLogger(__name__)

Meanwhile = Callable[[], None]


def nothing() -> None:
    """What is done meanwhile, by default."""


class Call(NamedTuple):
    """A request to one ps, and the pieces and the rows of tables that go and come with it."""

    lane: Lane
    request: messages.Request
    outgoing: Sequence[Piece] = ()
    incoming: Sequence[Piece] = ()
    rows_out: Sequence[memoryview] = ()
    rows_in: Sequence[memoryview] = ()


class Lanes:
    """The lanes to every ps, kept in step: what was asked is answered before anything else is asked.

    Apart from the client, so that what ends the connections when the client is collected need not hold the client.

    Args:
        lanes: By the ps's index. Owned by this object from now on.

    Attributes:
        sending: For each call of the last push, the seconds until it was handed over.
        waiting: For each, the seconds in which its answer was then waited for, one after the other.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = list(lanes)
        self._unanswered: set[Lane] = set()
        self.sending: list[float] = []
        self.waiting: list[float] = []
        self._executor: ThreadPoolExecutor | None = None
        self._aside: Future[list[messages.Reply]] | None = None

    def each(self) -> list[Lane]:
        """The lanes, by index.

        Raises:
            LocalProtocolError: After `goodbye` or `close`.
        """
        if not self._lanes:
            raise LocalProtocolError("this task has said goodbye to the ps tasks already; it cannot ask them anything")
        return self._lanes

    def exchange(self, calls: Sequence[Call], meanwhile: Meanwhile = nothing) -> list[messages.Reply]:
        """Ask several ps tasks at once. The answers of all are taken in, also if one is lost.

        Args:
            calls: What to ask.
            meanwhile: Called while the ps tasks are at work, before the first answer is taken in.

        Raises:
            UnavailableError: If one of them is lost; the first one that is.
            ParameterServerError: What ``meanwhile`` has raised; the answers are taken in first.
        """
        if self._aside is not None:
            self._await_aside()
        return self._exchange(calls, meanwhile)

    def exchange_aside(self, calls: Sequence[Call]) -> Future[list[messages.Reply]]:
        """`exchange` on a thread of its own; whatever is asked next waits until it is over. Does not block for long.

        Until then the memory that the pieces lie in belongs to that thread.
        """
        self._await_aside()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="exchange")
        self._aside = self._executor.submit(self._exchange, calls)
        return self._aside

    def _exchange(self, calls: Sequence[Call], meanwhile: Meanwhile = nothing) -> list[messages.Reply]:
        asked: list[Call] = []
        replies: list[messages.Reply] = []
        failures: list[ParameterServerError] = []
        now, sending, waiting = time.perf_counter(), [], []
        for call in calls:
            self._unanswered.add(call.lane)
            try:
                call.lane.start(call.request, call.outgoing, call.rows_out)
            except ParameterServerError as error:
                failures.append(error)
            else:
                asked.append(call)
            begun, now = now, time.perf_counter()
            sending.append(now - begun)
        try:
            meanwhile()
        except ParameterServerError as error:
            failures.append(error)
        for call in asked:
            try:
                replies.append(call.lane.finish(call.incoming, call.rows_in))
            except ParameterServerError as error:
                failures.append(error)
            else:
                self._unanswered.discard(call.lane)
            begun, now = now, time.perf_counter()
            waiting.append(now - begun)
        if calls and isinstance(calls[0].request, messages.Push):  # another question may come before they are read
            self.sending, self.waiting = sending, waiting
        if failures:
            raise failures[0]
        return replies

    def replace(self, lanes: Sequence[Lane]) -> None:
        """Go on with other lanes to the same ps tasks; the present ones are closed without a word."""
        self.close()
        self._lanes, self._unanswered = list(lanes), set()

    def goodbye(self, failure: str = "") -> None:
        """Tell every ps that this task has finished, or why it cannot go on; then close. Idempotent.

        A lane that was left in the middle of a request, by an interrupt perhaps, is closed without a word: the peer
        would take the word for the rest of that request.
        """
        self._await_aside()
        for lane in self._lanes:
            if lane not in self._unanswered:
                try:
                    self.exchange([Call(lane, messages.Goodbye(failure))])
                except ParameterServerError as error:
                    logger.debug("%s was told goodbye in vain: %s", lane.task, str(error))
        self.close()

    def close(self) -> None:
        """Close the connections without a word. Idempotent."""
        for lane in self._lanes:
            lane.close()  # which wakes a thread that waits for it
        self._lanes = []
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = self._aside = None

    def _await_aside(self) -> None:
        if self._aside is not None:
            wait([self._aside])
            self._aside = None

    def __repr__(self) -> str:
        return repr(self._lanes)
