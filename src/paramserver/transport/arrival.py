"""Waiting for the beginning of a message.

Rules
    * Who waits does so in ``poll`` and not in ``recv``: there a Unix socket wakes its owner also when the peer takes
      what was sent, for nothing, and twice for each request and its reply.
    * To fall asleep and to be woken takes longer than many a reply. So when the last wait was short, the next one looks
      again and again for a while before it sleeps. Where waits are longer, as they are when a worker computes, no time
      of a core is spent on looking.
"""

from __future__ import annotations

import select
import socket
import time

SHORT = 150e-6
"""Seconds that a short wait takes at most, and thus how long one looks: what a message there and one back take, each
of which wakes a core."""


class Arrival:
    """Waits at a connection. For one thread at a time.

    Args:
        connection: A socket that blocks; it is not kept.
    """

    def __init__(self, connection: socket.socket) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        self._poll = poll.poll
        self._was_short = False

    def wait(self, seconds: float) -> bool:
        """Wait until there is something to receive, or the stream has ended; False if that takes longer.

        Args:
            seconds: How long to wait; 0 means for ever.
        """
        begun = time.perf_counter()
        arrived = (self._was_short and self._look(begun + SHORT)) or bool(self._poll(seconds * 1000 or None))
        self._was_short = time.perf_counter() - begun < SHORT
        return arrived

    def _look(self, end: float) -> bool:
        """Whether something has come before the end."""
        while not self._poll(0):
            if time.perf_counter() >= end:
                return False
        return True
