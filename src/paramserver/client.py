"""The worker's view of all parameter servers: splits a request by ps, joins the replies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from paramserver.arena import ArenaLayout, pieces
from paramserver.errors import DeadlineError, ParameterServerError, RemoteProtocolError
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


class ParameterClient:
    """Talks to every ps of a run. Not thread-safe; every method blocks until all ps tasks have answered.

    Every method that talks to a ps raises ``UnavailableError`` naming the ps when its connection is lost, and
    ``RefusedError`` or a subclass when it refuses.

    Args:
        lanes: A lane to each ps, by index. Owned by the client from now on.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = list(lanes)
        self._layouts: list[Sequence[ArenaLayout]] = [() for _ in lanes]
        self._sequence = 0
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
        started = time.monotonic()
        for lane in self._lanes:
            while not self._ask(lane, messages.AwaitReady(WAIT_INTERVAL), messages.State).ready:
                waited = time.monotonic() - started
                if waited > timeout:
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
        return [lane.open(layouts) for lane, layouts in zip(self._lanes, self._layouts, strict=True)]

    def mark_ready(self, global_step: int) -> None:
        """The chief has initialized the variables: let the others begin."""
        self._ask_all(messages.MarkReady(global_step), messages.Done)
        self.global_step = global_step

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
        for lane, layouts, ps_parts, ps_pull in zip(self._lanes, self._layouts, parts, pull, strict=True):
            push = messages.Push(self._sequence, self.global_step, counts, tuple(ps_parts), tuple(ps_pull))
            lane.start(push, _outgoing(layouts, ps_parts))
        first = self._gather(messages.Applied, pull)[0]
        self.global_step = first.global_step
        return PushResult(first.global_step, first.staleness)

    def pull(self, arenas: Sequence[Sequence[int]]) -> int:
        """Bring the value memory of these arenas of each ps up to date; the global step."""
        for lane, wanted in zip(self._lanes, arenas, strict=True):
            lane.start(messages.Pull(tuple(wanted)))
        self.global_step = self._gather(messages.State, arenas)[0].global_step
        return self.global_step

    def read_global_step(self) -> int:
        """Ask ps:0 for the global step."""
        self.global_step = self._ask(self._lanes[0], messages.Pull(()), messages.State).global_step
        return self.global_step

    # --- the chief's duties

    def save(self, directory: str) -> list[messages.Saved]:
        """Have every ps write its shard into ``directory``, all at once.

        Raises:
            CheckpointError: If one of them cannot.
        """
        for shard, lane in enumerate(self._lanes):
            lane.start(messages.Save(directory, shard, len(self._lanes)))
        return self._gather(messages.Saved)

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
        for lane in self._lanes:
            while tasks := self._ask(lane, messages.AwaitWorkers(WAIT_INTERVAL), messages.Remaining).tasks:
                on_wait(tasks)

    # --- any time

    def status(self) -> list[messages.Status]:
        """What each ps holds and has done."""
        return self._ask_all(messages.GetStatus(), messages.Status)

    def goodbye(self, failure: str = "") -> None:
        """Tell every ps that this task has finished, or why it cannot go on; then close. Idempotent."""
        for lane in self._lanes:
            try:
                self._ask(lane, messages.Goodbye(failure), messages.Done)
            except ParameterServerError as error:
                logger.debug("%s was told goodbye in vain: %s", lane.task, error)
        self.close()

    def close(self) -> None:
        """Close the connections without a word. Idempotent."""
        for lane in self._lanes:
            lane.close()
        self._lanes = []

    def __repr__(self) -> str:
        return f"<ParameterClient of {self._lanes} at global step {self.global_step}>"

    def _declare(self, layouts: Sequence[Sequence[ArenaLayout]], *, create: bool) -> bool:
        self._layouts = list(layouts)
        for lane, ps_layouts in zip(self._lanes, layouts, strict=True):
            lane.start(messages.Declare(tuple(ps_layouts), create))
        return all(reply.ready for reply in self._gather(messages.Declared))

    def _ask(self, lane: Lane, request: messages.Request, expected: type[R]) -> R:
        lane.start(request)
        return _expect(lane, lane.finish(), expected)

    def _ask_all(self, request: messages.Request, expected: type[R]) -> list[R]:
        for lane in self._lanes:
            lane.start(request)
        return self._gather(expected)

    def _gather(self, expected: type[R], pull: Sequence[Sequence[int]] | None = None) -> list[R]:
        """The reply of each ps, all of them taken in before any is looked at, so that every lane stays in step."""
        replies = [
            lane.finish(_whole(layouts, arenas))
            for lane, layouts, arenas in zip(self._lanes, self._layouts, pull or [()] * len(self._lanes), strict=True)
        ]
        return [_expect(lane, reply, expected) for lane, reply in zip(self._lanes, replies, strict=True)]


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

