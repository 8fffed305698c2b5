"""The worker's view of all parameter servers: splits a request by ps, joins the replies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from paramserver.arena import ArenaLayout, pieces
from paramserver.errors import DeadlineError, LocalProtocolError, ParameterServerError, RemoteProtocolError
from paramserver.transport.lane import Lane, Piece, WorkerMemory
from paramserver.wire import messages
from paramserver.wire.messages import Part
from paramserver.wire.refusals import raised

logger = logging.getLogger(__name__)

WAIT_INTERVAL = 1.0
"""Seconds after which a ps answers a wait, so that a connection never looks dead while it waits."""

R = TypeVar("R", bound=messages.Message)


class PushResult(NamedTuple):
    """What came of a push.

    Attributes:
        global_step: Updates of the model after it.
        staleness: Updates by others between the pull of the values that its gradients were computed from, and it.
    """

    global_step: int
    staleness: int


class Call(NamedTuple):
    """A request to one ps, and the pieces that go and come with it."""

    lane: Lane
    request: messages.Request
    outgoing: Sequence[Piece] = ()
    incoming: Sequence[Piece] = ()


class Lanes:
    """The lanes to every ps, kept in step: what was asked is answered before anything else is asked.

    Apart from the client, so that what ends the connections when the client is collected need not hold the client.

    Args:
        lanes: By the ps's index. Owned by this object from now on.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = list(lanes)
        self._unanswered: set[Lane] = set()

    def each(self) -> list[Lane]:
        """The lanes, by index.

        Raises:
            LocalProtocolError: After `goodbye` or `close`.
        """
        if not self._lanes:
            raise LocalProtocolError("this task has said goodbye to the ps tasks already; it cannot ask them anything")
        return self._lanes

    def exchange(self, calls: Sequence[Call]) -> list[messages.Reply]:
        """Ask several ps tasks at once. The answers of all are taken in, also if one is lost.

        Raises:
            UnavailableError: If one of them is lost; the first one that is.
        """
        asked: list[Call] = []
        replies: list[messages.Reply] = []
        failures: list[ParameterServerError] = []
        for call in calls:
            self._unanswered.add(call.lane)
            try:
                call.lane.start(call.request, call.outgoing)
            except ParameterServerError as error:
                failures.append(error)
            else:
                asked.append(call)
        for call in asked:
            try:
                replies.append(call.lane.finish(call.incoming))
            except ParameterServerError as error:
                failures.append(error)
            else:
                self._unanswered.discard(call.lane)
        if failures:
            raise failures[0]
        return replies

    def goodbye(self, failure: str = "") -> None:
        """Tell every ps that this task has finished, or why it cannot go on; then close. Idempotent.

        A lane that was left in the middle of a request, by an interrupt perhaps, is closed without a word: the peer
        would take the word for the rest of that request.
        """
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
            lane.close()
        self._lanes = []

    def __repr__(self) -> str:
        return repr(self._lanes)


class ParameterClient:
    """Talks to every ps of a run. Not thread-safe; every method blocks until all ps tasks have answered.

    Every method that talks to a ps raises ``UnavailableError`` naming the ps when its connection is lost, and
    ``RefusedError`` or a subclass when it refuses. The client can be used after a refusal.

    Args:
        lanes: A lane to each ps, by index. Owned by the client from now on.

    Attributes:
        lanes: The lanes.
        global_step: Updates of the model, as the ps tasks last told it.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = Lanes(lanes)
        self._layouts: list[Sequence[ArenaLayout]] = [() for _ in lanes]
        self._sequence = 0
        self._local_step = 0  # what staleness is counted from: the step of the values that are here
        self.global_step = 0

    # --- start

    def create(self, layouts: Sequence[Sequence[ArenaLayout]]) -> bool:
        """The chief creates the arenas, one list of layouts for each ps; whether all of them are ready already."""
        return self._declare(layouts, create=True)

    def await_ready(self, timeout: float, on_wait: Callable[[float], None] = lambda _: None) -> None:
        """Wait until the chief has initialized the variables on every ps.

        Args:
            timeout: Seconds to wait for, in all.
            on_wait: Called about every second with the seconds that were waited so far.

        Raises:
            DeadlineError: If it has not by then.
            RefusedError: If the chief failed.
        """
        started, waited = time.monotonic(), 0.0
        for lane in self.lanes.each():
            while not self._ask(lane, messages.AwaitReady(_interval(timeout - waited)), messages.State).ready:
                waited = time.monotonic() - started
                if waited >= timeout:
                    raise DeadlineError(
                        f"the chief has not initialized the variables on {lane.task} within {timeout:g} s; "
                        "is it running? (session_creation_timeout_secs)",
                        timeout,
                    )
                on_wait(waited)

    def join(self, layouts: Sequence[Sequence[ArenaLayout]]) -> None:
        """Every other worker declares the arenas it expects.

        Raises:
            ModelMismatchError: If a ps holds others, naming the first variable that differs.
        """
        self._declare(layouts, create=False)

    def open(self) -> list[WorkerMemory]:
        """Make the memory for the declared arenas, for each ps."""
        return [lane.open(layouts) for lane, layouts in zip(self.lanes.each(), self._layouts, strict=True)]

    def mark_ready(self, global_step: int) -> None:
        """The chief has initialized the variables: let the others begin."""
        self._ask_all(messages.MarkReady(global_step), messages.Done)
        self._arrived(global_step)

    # --- steps

    def push_pull(
        self, parts: Sequence[Sequence[Part]], pull: Sequence[Sequence[int]], *, counts: bool
    ) -> PushResult:
        """Push what lies in the gradient memory, and bring the value memory up to date. The hot path.

        Args:
            parts: For each ps, what to do to its arenas.
            pull: For each ps, the arenas to pull.
            counts: Whether this is an update of the model, which the global step counts.
        """
        self._sequence += 1
        calls = [
            Call(
                lane,
                messages.Push(self._sequence, self._local_step, counts, tuple(ps_parts), tuple(ps_pull)),
                _outgoing(layouts, ps_parts),
                _whole(layouts, ps_pull),
            )
            for lane, layouts, ps_parts, ps_pull in zip(self.lanes.each(), self._layouts, parts, pull, strict=True)
        ]
        first = self._exchange(calls, messages.Applied)[0]
        self._arrived(first.global_step)
        return PushResult(first.global_step, first.staleness)

    def pull(self, arenas: Sequence[Sequence[int]]) -> int:
        """Bring the value memory of these arenas of each ps up to date; the global step."""
        calls = [
            Call(lane, messages.Pull(tuple(wanted)), (), _whole(layouts, wanted))
            for lane, layouts, wanted in zip(self.lanes.each(), self._layouts, arenas, strict=True)
        ]
        self._arrived(self._exchange(calls, messages.State)[0].global_step)
        return self.global_step

    def read_global_step(self) -> int:
        """Ask ps:0 for the global step."""
        self.global_step = self._ask(self.lanes.each()[0], messages.Pull(()), messages.State).global_step
        return self.global_step

    # --- the chief's duties

    def save(self, directory: str) -> list[messages.Saved]:
        """Have every ps write its shard into ``directory``, all at once.

        Raises:
            CheckpointError: If one of them cannot.
        """
        lanes = self.lanes.each()
        calls = [Call(lane, messages.Save(directory, shard, len(lanes))) for shard, lane in enumerate(lanes)]
        return self._exchange(calls, messages.Saved)

    def restore(self, directory: str) -> None:
        """Have every ps read its variables from a checkpoint.

        Raises:
            CheckpointError: If it is cut short or belongs to another model.
        """
        self._ask_all(messages.Restore(directory), messages.Done)

    def await_workers(self, on_wait: Callable[[tuple[str, ...]], None] = lambda _: None) -> None:
        """Wait until this task is the only one that still trains. Blocks for as long as the others take.

        Args:
            on_wait: Called about every second with the tasks that are waited for.
        """
        for lane in self.lanes.each():
            while tasks := self._ask(lane, messages.AwaitWorkers(WAIT_INTERVAL), messages.Remaining).tasks:
                on_wait(tasks)

    # --- any time

    def status(self) -> list[messages.Status]:
        """What each ps holds and has done."""
        return self._ask_all(messages.GetStatus(), messages.Status)

    def goodbye(self, failure: str = "") -> None:
        """Tell every ps that this task has finished, or why it cannot go on; then close. Idempotent."""
        self.lanes.goodbye(failure)

    def close(self) -> None:
        """Close the connections without a word. Idempotent."""
        self.lanes.close()

    def __repr__(self) -> str:
        return f"<ParameterClient of {self.lanes} at global step {self.global_step}>"

    def _arrived(self, global_step: int) -> None:
        """Values of this step are here."""
        self.global_step = self._local_step = global_step

    def _declare(self, layouts: Sequence[Sequence[ArenaLayout]], *, create: bool) -> bool:
        self._layouts = list(layouts)
        calls = [
            Call(lane, messages.Declare(tuple(ps_layouts), create))
            for lane, ps_layouts in zip(self.lanes.each(), layouts, strict=True)
        ]
        return all(reply.ready for reply in self._exchange(calls, messages.Declared))

    def _ask(self, lane: Lane, request: messages.Request, expected: type[R]) -> R:
        return self._exchange([Call(lane, request)], expected)[0]

    def _ask_all(self, request: messages.Request, expected: type[R]) -> list[R]:
        return self._exchange([Call(lane, request) for lane in self.lanes.each()], expected)

    def _exchange(self, calls: Sequence[Call], expected: type[R]) -> list[R]:
        replies = self.lanes.exchange(calls)
        return [_expect(call.lane, reply, expected) for call, reply in zip(calls, replies, strict=True)]


def _outgoing(layouts: Sequence[ArenaLayout], parts: Sequence[Part]) -> list[Piece]:
    return [
        Piece(part.arena, start, stop)
        for part in parts
        for start, stop in (pieces(part.ranges) if part.ranges is not None else layouts[part.arena].pieces)
    ]


def _whole(layouts: Sequence[ArenaLayout], arenas: Sequence[int]) -> list[Piece]:
    return [Piece(arena, start, stop) for arena in arenas for start, stop in layouts[arena].pieces]


def _expect(lane: Lane, reply: messages.Reply, expected: type[R]) -> R:
    if isinstance(reply, expected):
        return reply
    if isinstance(reply, messages.Refused):
        raise raised(reply, lane.task)
    raise RemoteProtocolError(f"{lane.task} was expected to answer {expected.__name__}, and answered {reply}")


def _interval(remaining: float) -> float:
    return min(WAIT_INTERVAL, max(remaining, 0.0))
