"""The watch of a ps over the workers: those that are silent count as lost, and a wait for others is said."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from paramserver.store.liveness import Liveness
from paramserver.store.membership import Membership, Outlook
from paramserver.transport.waiting import WaitLog

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two looks."""


class Watch:
    """Looks after the workers on a thread of its own, between `start` and `stop`.

    Args:
        task: The ps.
        membership: The tasks that take part in the run.
        liveness: Their signs of life.
        hang_up: Ends all connections of an incarnation.
    """

    def __init__(self, task: str, membership: Membership, liveness: Liveness, hang_up: Callable[[str], None]) -> None:
        self._task = task
        self._membership = membership
        self._liveness = liveness
        self._hang_up = hang_up
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{task} watches", daemon=True)
        self._wait: WaitLog | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch. Idempotent."""
        self._over.set()
        if self._thread.ident:
            self._thread.join()

    def look(self) -> None:
        """Give up the workers that are silent, and log whom the ps waits for, if that takes long."""
        for task, incarnation, timeout in self._liveness.take_silent():
            logger.warning(
                "%s has not heard of %s for %g s: it counts as lost; is it stopped, or its network down?",
                self._task,
                task,
                timeout,
            )
            self._membership.expire(incarnation)
            self._hang_up(incarnation)
        self._say_wait()

    def _say_wait(self) -> None:
        absent = self._membership.absent()
        if self._membership.joined() or not absent or self._membership.outlook is Outlook.OVER:
            self._wait = None
            return
        self._wait = self._wait or WaitLog(self._task)
        self._wait.say(", ".join(absent), "no worker is connected")

    def _run(self) -> None:
        while not self._over.wait(INTERVAL):
            self.look()
