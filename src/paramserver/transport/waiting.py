"""Log lines about a wait: who waits for whom, since when, and until when."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

logger = logging.getLogger(__name__)

FIRST_AFTER = 10.0
"""Seconds after which a wait is told."""
LONGEST_INTERVAL = 300.0
"""Limit for the seconds between two lines about one wait; the interval doubles from `FIRST_AFTER`."""


class WaitLog:
    """The lines about one wait of a task, which begins now.

    Call `say` as often as the wait allows; a line is logged after `FIRST_AFTER` seconds, and then ever less often.

    Args:
        task: The task that waits.
        timeout: Seconds after which it gives up; None if it never does.
        clock: Returns seconds that never decrease.
        now: Returns the time of day.

    >>> logging.getLogger(__name__).setLevel(logging.INFO)
    >>> log = WaitLog("worker:0", 60.0, clock=iter([0.0, 5.0, 10.0]).__next__, now=lambda: datetime(2026, 1, 1, 8))
    >>> [log.text("ps:0", "connection refused") for _ in range(2)]
    ['', 'worker:0 waits for ps:0 since 08:00:00 (10 s), until 08:01:00: connection refused']
    """

    def __init__(
        self,
        task: str,
        timeout: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._task, self._timeout, self._clock = task, timeout, clock
        self._begun, self._since = clock(), now()
        self._interval = FIRST_AFTER
        self._due = self._begun + FIRST_AFTER

    def say(self, whom: str, why: str = "") -> None:
        """Log who is waited for, and why that takes long, if it is time."""
        if text := self.text(whom, why):
            logger.info("%s", text)

    def text(self, whom: str, why: str = "") -> str:
        """Return the line to log now; empty if it is not time."""
        waited = self._clock() - self._begun
        if self._begun + waited < self._due:
            return ""
        self._due = self._begun + waited + self._interval
        self._interval = min(2 * self._interval, LONGEST_INTERVAL)
        line = f"{self._task} waits for {whom} since {self._since:%H:%M:%S} ({waited:.0f} s)"
        if self._timeout is not None:
            line += f", until {self._since + timedelta(seconds=self._timeout):%H:%M:%S}"
        return f"{line}: {why}" if why else line
