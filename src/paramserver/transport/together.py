"""Several exchanges at once, on one thread: each moves on whenever its connection can take or give bytes."""

from __future__ import annotations

import select
import time
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from paramserver.errors import ParameterServerError
from paramserver.transport.frames import FrameSocket
from paramserver.wire.messages import Reply

LOOK_INTERVAL = 1.0
"""Seconds after which connections are looked at even if none of them has moved: another thread may have closed one."""


class Steps(NamedTuple):
    """The rest of an exchange with one peer.

    Attributes:
        frames: The connection.
        moves: Moves what can be moved without waiting, then yields; returns the reply when all is sent and received.
    """

    frames: FrameSocket
    moves: Generator[None, None, Reply]


def finish_together(exchanges: Sequence[Steps]) -> Iterator[tuple[int, Reply | ParameterServerError]]:
    """Finish exchanges; yield the index of each when it is over, with its reply or the error that has ended it.

    Blocks. A connection on which nothing moves within its time limit is lost.
    """
    moved_at = dict.fromkeys(range(len(exchanges)), time.monotonic())
    movable = set(moved_at)
    while moved_at:
        now = time.monotonic()
        for index in list(moved_at):
            frames, moves = exchanges[index]
            if index in movable or frames.is_closed:
                moved_at[index] = now
                outcome = _outcome(moves)
            else:
                is_late = frames.time_limit and now - moved_at[index] > frames.time_limit
                outcome = frames.silent() if is_late else None
            if outcome is not None:
                del moved_at[index]
                yield index, outcome
        if moved_at:
            movable = _await_movable({index: exchanges[index].frames for index in moved_at})


def _outcome(moves: Generator[None, None, Reply]) -> Reply | ParameterServerError | None:
    """Move on; return how the exchange has ended, or None if it goes on."""
    try:
        next(moves)
    except StopIteration as end:
        reply: Reply = end.value
        return reply
    except ParameterServerError as error:
        return error
    return None


def _await_movable(connections: dict[int, FrameSocket]) -> set[int]:
    """Wait until some connections can take or give bytes, and return their indices; none after `LOOK_INTERVAL`."""
    poll = select.poll()
    by_descriptor = {frames.fileno(): index for index, frames in connections.items() if not frames.is_closed}
    for descriptor, index in by_descriptor.items():
        poll.register(descriptor, connections[index].events)
    if len(by_descriptor) < len(connections):
        return set()
    return {by_descriptor[descriptor] for descriptor, _ in poll.poll(LOOK_INTERVAL * 1000)}
