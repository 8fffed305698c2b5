"""The lanes to all parameter servers of a run, used together."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

from paramserver.errors import LocalProtocolError, ParameterServerError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.transport.lane import Lane, Piece, WorkerMemory
from paramserver.transport.together import Steps, finish_together
from paramserver.wire import messages
from paramserver.wire.refusals import raised

logger = logging.getLogger(__name__)

LARGE_PIECE = 64 << 10
"""Elements of a piece from which on the buffers of a connection may be too small for a call."""

Meanwhile = Callable[[], None]

GONE = ("unavailable", "failed", "over")
"""Kinds of refusals that concern this task or the whole run, and not what the ps holds."""

NUMBERED = (messages.Push, messages.UpdateVariable)
"""Requests that a ps carries out once, however often they arrive."""


def nothing() -> None:
    """Do nothing; the default for `Meanwhile`."""


class Dialer(Protocol):
    """Connects this task to the ps tasks of its run, any number of times."""

    def dial_all(self, timeout: float, kept: Sequence[WorkerMemory] = ()) -> list[Lane]:
        """Connect to every ps within ``timeout`` seconds in total, by lanes that can go on with the ``kept`` memory.

        Each call after the first makes a new incarnation of this task.

        Raises:
            ParameterServerError: If a connection fails.
        """

    def redial(self, ps: int, kept: WorkerMemory | None) -> Lane:
        """Connect to a ps that was there a moment ago, by a lane that can go on with the ``kept`` memory.

        Raises:
            UnavailableError: If the ps is not there any more.
        """

    def silence(self, ps: int) -> str:
        """Return what is to be said of a ps whose lane was closed because it was silent; empty otherwise."""

    def close(self) -> None:
        """End what goes on beside the lanes. Idempotent."""


class Call(NamedTuple):
    """A request to one ps, with the pieces and table rows that are sent and received with it."""

    lane: Lane
    request: messages.Request
    outgoing: Sequence[Piece] = ()
    incoming: Sequence[Piece] = ()
    rows_out: Sequence[memoryview] = ()
    rows_in: Sequence[memoryview] = ()


class Answers(NamedTuple):
    """Answers to several calls, in the order of the calls.

    Attributes:
        replies: The replies.
        sending: Seconds until each call was handed over, or as much of it as its lane takes without waiting.
        waiting: Seconds spent waiting for each answer after that, since the answer before it.
    """

    replies: list[messages.Reply]
    sending: list[float]
    waiting: list[float]


class _Outstanding(NamedTuple):
    """Calls that were begun and are not answered yet.

    Attributes:
        calls: By the index of the ps.
        number: The highest number of a request that was ever begun.
        background: Set if the background thread carries out the calls.
    """

    calls: dict[int, Call]
    number: int
    background: _BackgroundRun | None = None


class _BackgroundRun:
    """An exchange on the background thread, which the asking thread may take back before it has begun.

    Uses no lock: an interrupt may come between the end of a ``with`` statement and the release of its lock.
    """

    def __init__(self) -> None:
        self._owner: dict[str, int] = {}
        self._is_over = threading.Event()

    def claim(self) -> bool:
        """Claim the exchange; return whether this thread carries it out. The answer for a thread never changes."""
        mine = threading.get_ident()
        return self._owner.setdefault("thread", mine) == mine  # atomic: the first thread wins

    def end(self) -> None:
        """Note that the background thread is done and has received all answers that will come."""
        self._is_over.set()

    def wait(self) -> None:
        """Wait until `end` is called."""
        self._is_over.wait()


class Exchange:
    """The lanes to every ps, kept in step: each request is answered before the next one is sent.

    Separate from the client, so that the finalizer that closes the connections does not hold the client.

    Rules
        * Any exception may end an exchange at any point: an interrupt, a program's own time limit, a lost connection. A
          lane with an outstanding answer is then unusable, because its next bytes belong to that answer. It is replaced
          before anything else is asked.
        * Numbered requests are then sent once more with the same number: a ps carries out each number once, and goes on
          where it stopped. So an update that was begun is completed on every ps.
        * A forked child inherits the connections, and must not use them.

    Args:
        lanes: By the index of the ps. Owned by this object from now on.
        dialer: Makes new connections; None if lost connections stay lost.

    Attributes:
        dialer: See above.
        layouts: The declared layouts, for each ps.
        memories: The memory for the layouts, for each ps; empty until it is made.
        epochs: The epoch of the values of each ps; see `wire.messages.MarkReady`.
        renewed_at: When a lane was last replaced, by the monotonic clock.
        has_updated: Whether an update of the model was pushed.
        refusing: The ps tasks, by index, that refused the last push.
    """

    def __init__(self, lanes: Sequence[Lane], dialer: Dialer | None = None) -> None:
        self._lanes = list(lanes)
        self._numbers = {lane.task: ps for ps, lane in enumerate(self._lanes)}
        self.dialer = dialer
        self._pid = os.getpid()
        self.layouts: list[Sequence[ArenaLayout]] = [() for _ in lanes]
        self.memories: list[WorkerMemory] = []
        self.epochs = [""] * len(lanes)
        self.renewed_at = -math.inf
        self._outstanding = _Outstanding({}, 0)
        self._later: list[tuple[int, Call]] = []
        self.has_updated = False
        self.refusing: set[int] = set()
        self._executor: ThreadPoolExecutor | None = None
        self._background: Future[Answers] | None = None

    def each(self) -> list[Lane]:
        """Return the lanes, by index.

        Raises:
            LocalProtocolError: After `goodbye` or `close`, and in a forked child.
        """
        if self._pid != os.getpid():
            raise LocalProtocolError(
                f"process {os.getpid()} was forked from the task that is connected to the ps tasks ({self._pid}), and "
                "cannot ask them anything: make steps and look up rows in the task itself, or start the child by "
                "'spawn' with a strategy of its own"
            )
        if not self._lanes:
            raise LocalProtocolError("this task has said goodbye to the ps tasks already; it cannot ask them anything")
        return self._lanes

    def run(self, calls: Sequence[Call], meanwhile: Meanwhile = nothing) -> Answers:
        """Ask several ps tasks at once. All answers are received, even if a ps is lost.

        Args:
            calls: The calls, at most one for each ps.
            meanwhile: Called while the ps tasks are at work, before the first answer is received.

        Raises:
            UnavailableError: If a ps is lost; the error of the first lost ps.
            LocalProtocolError: If two calls are for the same ps.
        """
        if self._later:
            self.mend()
        return self._run(self._begin(calls), meanwhile)

    def run_in_turn(self, calls: Sequence[Call]) -> list[messages.Reply]:
        """Carry out numbered calls one after another; if this is interrupted, `mend` carries out the rest."""
        tasks = [self._numbers[call.lane.task] for call in calls]
        self._mend(tasks)
        self._later = list(zip(tasks, calls, strict=True))
        replies = list[messages.Reply]()
        for call in calls:
            replies += self._run(self._begin([call])).replies
            self._later = self._later[1:]
        return replies

    def run_in_background(self, calls: Sequence[Call]) -> Future[Answers]:
        """Do `run` on a background thread; the next request waits until that is over. Does not block for long.

        Until then the memory of the pieces belongs to that thread.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="exchange")
        if self._later:
            self.mend()
        calls = self._begin(calls, _BackgroundRun())
        self._background = self._executor.submit(self._run_claimed, calls, self._outstanding)
        return self._background

    def mend(self) -> list[messages.Reply]:
        """Wait for calls under way, complete interrupted ones, and return the answers to the latter. Blocks.

        Raises:
            UnavailableError: If a ps cannot be reached any more, or holds nothing of this run.
        """
        return self._mend(range(len(self._lanes)))

    def _mend(self, tasks: Container[int]) -> list[messages.Reply]:
        """Do `mend` for some of the ps tasks only; the others may be lost."""
        if self._background is not None:
            wait([self._background])
            self._background = None
        if not self._outstanding.calls and not self._later:
            return []
        self.each()
        background = self._outstanding.background
        if background is not None and not background.claim():
            background.wait()
        return self._ask_again(tasks)

    @property
    def begun(self) -> int:
        """The highest number of a request that was begun: it is carried out by now, or `mend` sends it once more."""
        return self._outstanding.number

    def _begin(self, calls: Sequence[Call], background: _BackgroundRun | None = None) -> Sequence[Call]:
        """Register calls as begun, on usable lanes, and return the calls with the lanes to use for them."""
        self.each()
        numbers, before = self._numbers, self._outstanding
        unanswered = {numbers[call.lane.task]: call for call in calls}
        if len(unanswered) < len(calls):
            count = len(unanswered)
            raise LocalProtocolError(f"{len(calls)} requests to {count} ps tasks at once: one each is answered")
        if self._background is not None or before.calls:
            self._mend(unanswered)
            before = self._outstanding
            unanswered = before.calls | unanswered
        lanes, number = self._lanes, before.number
        for call in calls:
            if call.lane is not lanes[numbers[call.lane.task]]:
                calls = [call._replace(lane=lanes[numbers[call.lane.task]]) for call in calls]
                break
        for call in calls:
            if isinstance(call.request, NUMBERED) and call.request.sequence > number:
                number = call.request.sequence
        # One assignment, so that after an interrupt either all calls have begun or none.
        self._outstanding = _Outstanding(unanswered, number, background)
        return calls

    def _run(self, calls: Sequence[Call], meanwhile: Meanwhile = nothing) -> Answers:
        asked: list[Call] = []
        failures: list[ParameterServerError] = []
        now, sending = time.perf_counter(), list[float]()
        for call in calls:
            try:
                call.lane.start(call.request, call.outgoing, call.rows_out)
            except LocalProtocolError as error:  # raised before anything is sent
                failures.append(error)
                del self._outstanding.calls[self._numbers[call.lane.task]]
            except ParameterServerError as error:
                failures.append(self._explained(call, error))
            else:
                asked.append(call)
            begun, now = now, time.perf_counter()
            sending.append(now - begun)
        meanwhile()
        replies: dict[int, messages.Reply] = {}
        waiting = [0.0] * len(asked)
        for index, outcome in _finish(asked):
            if isinstance(outcome, ParameterServerError):
                failures.append(self._explained(asked[index], outcome))
            else:
                replies[index] = outcome
                del self._outstanding.calls[self._numbers[asked[index].lane.task]]
            begun, now = now, time.perf_counter()
            waiting[index] = now - begun
        if failures:
            raise failures[0]
        return Answers([replies[index] for index in range(len(asked))], sending, waiting)

    def _explained(self, call: Call, error: ParameterServerError) -> ParameterServerError:
        """Return the error to raise for a lane that has failed."""
        silence = self.dialer.silence(self._numbers[call.lane.task]) if self.dialer is not None else ""
        return UnavailableError(silence, call.lane.task) if silence else error

    def _run_claimed(self, calls: Sequence[Call], begun: _Outstanding) -> Answers:
        assert begun.background is not None  # noqa: S101  # it was begun so
        if not begun.background.claim():  # the asking thread was interrupted, and has made up for this exchange
            return Answers([], [], [])
        try:
            return self._run(calls)
        finally:
            begun.background.end()

    def _ask_again(self, tasks: Container[int]) -> list[messages.Reply]:
        replies, unanswered = list[messages.Reply](), self._outstanding.calls
        for ps, call in list(unanswered.items()):
            if ps in tasks:
                lane = self._made_anew(ps)
                reply = _asked_once_more(lane, call) if isinstance(call.request, NUMBERED) else None
                del unanswered[ps]
                if isinstance(reply, messages.Refused):
                    self.refusing.add(ps)
                    raise raised(reply, lane.task)
                if reply is not None:
                    replies.append(reply)
        self._outstanding = _Outstanding(unanswered, self._outstanding.number)
        while self._later and self._later[0][0] in tasks:
            ps, call = self._later[0]
            reply = _asked_once_more(self._lanes[ps], call)
            self._later = self._later[1:]
            if isinstance(reply, messages.Refused):
                raise raised(reply, self._lanes[ps].task)
            replies.append(reply)
        return replies

    def _made_anew(self, ps: int) -> Lane:
        """Replace the unusable lane to a ps by a new one, and return it."""
        old = self._lanes[ps]
        old.close()
        if self.dialer is None:
            raise UnavailableError(
                f"the connection to {old.task} was left in the middle of a request, by an interrupt perhaps; "
                "strategy.recover() makes a new one",
                old.task,
            )
        lane = self.dialer.redial(ps, self.memories[ps] if self.memories else None)
        if self.layouts[ps]:
            self._declare_again(lane, ps)
        if self.memories:
            lane.open(self.layouts[ps], self.memories[ps])
        self._lanes[ps] = lane
        self.renewed_at = time.monotonic()
        return lane

    def _declare_again(self, lane: Lane, ps: int) -> None:
        lane.start(messages.Declare(tuple(self.layouts[ps]), False))
        reply = lane.finish()
        if isinstance(reply, messages.Refused) and reply.kind in GONE:
            lane.close()
            raise raised(reply, lane.task)
        if not isinstance(reply, messages.Declared) or reply.epoch != self.epochs[ps]:
            lane.close()
            raise UnavailableError(
                f"{lane.task} does not hold the values of this run any more; strategy.recover() waits until the chief "
                "has brought them back",
                lane.task,
            )

    def replace(self, lanes: Sequence[Lane]) -> None:
        """Go on with other lanes to the same ps tasks, and close the present ones without a goodbye.

        Interrupted requests are not repeated.
        """
        self._close_lanes()
        self._lanes = list(lanes)
        self.renewed_at = time.monotonic()

    def goodbye(self, failure: str = "") -> None:
        """Tell every ps that this task has finished, or why it cannot go on, then close. Idempotent.

        A lane left in the middle of a request, perhaps by an interrupt, is closed without a goodbye: the peer would
        read the goodbye as the rest of that request.
        """
        if self._pid != os.getpid():
            return
        if self._background is not None:
            wait([self._background])
        if self._lanes and self.memories and not self.has_updated and not failure:
            logger.warning(
                "this task ends without having made an update of its model: optimizer.step() is to be called on what "
                "strategy.prepare() has returned"
            )
        for ps, lane in enumerate(self._lanes):
            if ps not in self._outstanding.calls:
                try:
                    lane.start(messages.Goodbye(failure))
                    lane.finish()
                except ParameterServerError as error:
                    logger.debug("%s did not receive the goodbye: %s", lane.task, str(error))
        self.close()

    def close(self) -> None:
        """Close the connections without a goodbye. Idempotent."""
        if self._pid != os.getpid():
            return  # closing would end the connections of the parent
        self._close_lanes()
        if self.dialer is not None:
            self.dialer.close()

    def _close_lanes(self) -> None:
        for lane in self._lanes:
            lane.close()  # also wakes a thread that waits on this lane
        self._lanes, self._later = [], []
        self._outstanding = _Outstanding({}, self._outstanding.number)
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = self._background = None

    def __repr__(self) -> str:
        return repr(self._lanes)


def _finish(calls: Sequence[Call]) -> Iterator[tuple[int, messages.Reply | ParameterServerError]]:
    """Receive the answers to calls that were handed over; yield the index of each call with its answer or its error.

    The answers come one after the other: a ps that is done early waits in the buffers of its connection. Only where
    these are too small for what is sent and received, all connections are used at once.
    """
    together = _steps(calls) if len(calls) > 1 and any(map(_is_large, calls)) else {}
    numbers = list(together)
    for position, outcome in finish_together(list(together.values())):
        yield numbers[position], outcome
    for index, call in enumerate(calls):
        if index not in together:
            try:
                yield index, call.lane.finish(call.incoming, call.rows_in)
            except ParameterServerError as error:
                yield index, error


def _steps(calls: Sequence[Call]) -> dict[int, Steps]:
    steps = ((index, call.lane.finishing(call.incoming, call.rows_in)) for index, call in enumerate(calls))
    return {index: each for index, each in steps if each is not None}


def _is_large(call: Call) -> bool:
    return any(piece.stop - piece.start >= LARGE_PIECE for piece in (*call.outgoing, *call.incoming))


def _asked_once_more(lane: Lane, call: Call) -> messages.Reply:
    lane.start(call.request, call.outgoing, call.rows_out)
    return lane.finish(call.incoming, call.rows_in)
