"""Waiting for the beginning of a message.

Rules
    * The wait is in ``poll`` and not in ``recv``. In ``recv``, a Unix socket wakes its owner also when the peer takes
      the sent bytes: in vain, and twice for each request and its reply.
    * Falling asleep and being woken takes longer than many a reply. So after a short wait, the next one polls
      repeatedly for a while before it sleeps. After a long wait, as when a worker computes, no core time is spent on
      polling.
"""

from __future__ import annotations

import select
import socket
import time

SHORT = 150e-6
"""Limit for a short wait, and so for polling, in seconds: the time of a message and its reply, each of which wakes a
core."""


class Arrival:
    """Waits for input on a connection. For one thread at a time.

    Args:
        connection: A blocking socket; no reference is kept.
    """

    def __init__(self, connection: socket.socket) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        self._poll = poll.poll
        self._was_short = False

    def wait(self, seconds: float) -> bool:
        """Wait until there is something to receive or the stream has ended; return False if the time is over before.

        Args:
            seconds: Time to wait; 0 means forever.
        """
        begun = time.perf_counter()
        arrived = (self._was_short and self._look(begun + SHORT)) or bool(self._poll(seconds * 1000 or None))
        self._was_short = time.perf_counter() - begun < SHORT
        return arrived

    def _look(self, end: float) -> bool:
        """Poll until something has come, and return whether that was before ``end``."""
        while not self._poll(0):
            if time.perf_counter() >= end:
                return False
        return True
