"""Who takes part in a run, and when the run is over. No clock and no thread of its own.

Rules
    * The run is over when the chief has said goodbye and so has every other worker, or is gone.
    * A worker that was never seen is waited for until a grace period after the chief's goodbye: it may just be
      slow to start.
    * A chief that is gone without a goodbye is waited for while anyone still trains, and for the grace period after.
    * Who comes after the chief's goodbye is told that the run is over.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

from paramserver.errors import RefusedError, RunOverError


class Presence(enum.Enum):
    """What is known of a worker."""

    EXPECTED = "expected"
    JOINED = "joined"
    LEFT = "left"
    LOST = "lost"


class Outlook(enum.Enum):
    """What has to happen for the run to be over."""

    GOING_ON = "going on"
    ABSENT = "waiting for the absent"
    """Nobody is connected; what is missing is a worker that was never seen, or a chief that was lost."""
    OVER = "over"


class Roster:
    """The presence of the chief and the workers. Thread-safe.

    Args:
        chief: The task whose goodbye ends the run.
        workers: All tasks that train, the chief among them.
    """

    def __init__(self, chief: str, workers: Iterable[str]) -> None:
        self.chief = chief
        self._presence = dict.fromkeys(workers, Presence.EXPECTED)
        self._connections: dict[str, Counter[str]] = defaultdict(Counter)  # of each incarnation that has not left
        self._changed = threading.Condition()
        self._stopped = False

    def join(self, task: str, incarnation: str) -> None:
        """A worker has connected.

        Raises:
            RunOverError: If the chief has finished already.
            RefusedError: If no such task takes part in the run.
        """
        with self._changed:
            if task not in self._presence:
                raise RefusedError(f"{task} does not take part in this run; its workers are {self}", task)
            self.check_going_on(task)
            self._presence[task] = Presence.JOINED
            self._connections[task][incarnation] += 1
            self._changed.notify_all()

    def check_going_on(self, task: str) -> None:
        """Raises RunOverError if there is nothing to do for ``task`` any more, because the chief has finished."""
        if self._presence.get(self.chief) is Presence.LEFT:
            raise RunOverError(f"{task} came after the end: {self.chief} has finished the run")

    def leave(self, task: str, incarnation: str) -> None:
        """An incarnation of a worker has said goodbye. The worker has left, unless another one is connected."""
        self._go(task, incarnation, Presence.LEFT)

    def disconnect(self, task: str, incarnation: str) -> None:
        """A connection of a worker has ended; without a goodbye it is lost, unless it has come back meanwhile."""
        with self._changed:
            connections = self._connections[task]
            connections[incarnation] -= 1
            if not connections[incarnation]:
                self._go(task, incarnation, Presence.LOST)
            elif connections[incarnation] < 0:  # it had left before
                del connections[incarnation]

    def stop(self) -> None:
        """Somebody wants the ps to end now."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def joined(self, besides: str = "") -> tuple[str, ...]:
        """The workers that are connected now."""
        return tuple(
            task for task, presence in self._presence.items() if presence is Presence.JOINED and task != besides
        )

    def await_alone(self, task: str, timeout: float) -> tuple[str, ...]:
        """Wait until ``task`` is the only one connected, for at most ``timeout`` seconds; who is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self.joined(besides=task), timeout)
            return self.joined(besides=task)

    @property
    def outlook(self) -> Outlook:
        """What has to happen for the run to be over."""
        chief = self._presence.get(self.chief)
        if self.joined() or chief not in (Presence.LEFT, Presence.LOST):
            return Outlook.GOING_ON
        if chief is Presence.LOST or Presence.EXPECTED in self._presence.values():
            return Outlook.ABSENT
        return Outlook.OVER

    def await_over(self, grace: float) -> bool:
        """Block until the run is over; False if it ended without the chief's goodbye.

        Args:
            grace: Seconds to wait for workers that were never seen, and for a chief that was lost.
        """
        with self._changed:
            while not self._stopped and (outlook := self.outlook) is not Outlook.OVER:
                changed = self._changed.wait(grace if outlook is Outlook.ABSENT else None)
                if not changed and self.outlook is Outlook.ABSENT:  # somebody may have come at the last moment
                    break
            return self._presence.get(self.chief) is Presence.LEFT

    def __str__(self) -> str:
        return ", ".join(f"{task} ({presence.value})" for task, presence in self._presence.items())

    def _go(self, task: str, incarnation: str, presence: Presence) -> None:
        with self._changed:
            self._connections[task].pop(incarnation, None)
            if not self._connections[task]:
                self._presence[task] = presence
            self._changed.notify_all()
