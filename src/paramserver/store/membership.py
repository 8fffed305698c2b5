"""The membership of a run: which tasks take part, and when the run is over. No clock and no thread of its own.

Rules
    * The run is over when the chief has said goodbye and every other worker has said goodbye or is gone.
    * A worker that was never seen is waited for until a grace period after the chief's goodbye: it may just be slow to
      start.
    * A chief that is gone without a goodbye is waited for while any worker still trains, and for the grace period after
      that.
    * A worker that comes after the chief's goodbye is told that the run is over.
    * A process of a worker may have several strategies. Each trains a model of its own; the n-th strategies of all
      workers train the same model. A restarted process begins with the first model.
    * An incarnation is a generation of a strategy: a strategy that comes back after a loss is a new one. One that was
      silent for too long, or that a newer one has replaced, is expired: what it still sends is refused.
    * Of two processes with the name of one task, the one that was started later takes part. The names of processes sort
      by the time of their start.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

from paramserver.errors import RefusedError, RunOverError, UnavailableError


class Presence(enum.Enum):
    """State of a worker, as far as it is known."""

    EXPECTED = "expected"
    JOINED = "joined"
    LEFT = "left"
    LOST = "lost"


class Outlook(enum.Enum):
    """State of a run: whether it goes on, waits for absent tasks, or is over."""

    GOING_ON = "going on"
    ABSENT = "waiting for the absent"
    """No worker is connected; a worker that was never seen or a lost chief is missing."""
    OVER = "over"


class _Process:
    """The strategies of one process of a worker, numbered in the order in which they come.

    Args:
        name: The common beginning of the names of the strategies.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._numbers: dict[str, int] = {}
        self._lost: list[int] = []
        self._count = 0

    def number(self, strategy: str) -> int:
        """Return the number of a strategy; a new one takes the number of one that was lost, if there is any."""
        if strategy not in self._numbers:
            if self._lost:
                self._numbers[strategy] = self._lost.pop(0)
            else:
                self._numbers[strategy] = self._count
                self._count += 1
        number = self._numbers[strategy]
        if number in self._lost:
            self._lost.remove(number)
        return number

    def lose(self, strategy: str) -> None:
        """Note that a strategy was lost; it, or another one in its place, may come back."""
        if strategy in self._numbers:  # else it belongs to an earlier process
            self._lost.append(self._numbers[strategy])


class Membership:
    """The presence of the chief and the workers. Thread-safe.

    Args:
        chief: The task whose goodbye ends the run.
        workers: All tasks that train, including the chief.
        takes_more: Whether workers that are not among these may join, too. None of them is waited for before it joins.
    """

    def __init__(self, chief: str, workers: Iterable[str], *, takes_more: bool = False) -> None:
        self.chief = chief
        self._takes_more = takes_more
        self._presence = dict.fromkeys(workers, Presence.EXPECTED)
        self._processes: dict[str, _Process] = {}
        self._connections: dict[str, Counter[str]] = defaultdict(Counter)  # of each incarnation that has not left
        self._expired: set[str] = set()  # incarnations
        self._changed = threading.Condition()
        self._stopped = False

    def join(self, task: str, incarnation: str) -> int:
        """Note that a worker has connected, and return the number of the model that its incarnation trains.

        Raises:
            RunOverError: If the chief has finished already.
            RefusedError: If no such task takes part in the run, or a newer process is this task.
            UnavailableError: If the incarnation has expired.
        """
        with self._changed:
            if task not in self._presence and not self._takes_more:
                raise RefusedError(f"{task} does not take part in this run; its workers are {self}", task)
            self.check_going_on(task)
            self._admit(task, incarnation)
            self._presence[task] = Presence.JOINED
            self._connections[task][incarnation] += 1
            self._changed.notify_all()
            return self._number(task, incarnation)

    def check_going_on(self, task: str) -> None:
        """Check that the run goes on for ``task``.

        Raises:
            RunOverError: If the chief has finished.
        """
        if self._presence.get(self.chief) is Presence.LEFT:
            raise RunOverError(f"{task} came after the end: {self.chief} has finished the run")

    def leave(self, task: str, incarnation: str) -> None:
        """Note the goodbye of a worker's incarnation. The worker has left, unless another incarnation is connected."""
        self._go(task, incarnation, Presence.LEFT)

    def disconnect(self, task: str, incarnation: str) -> bool:
        """Note the end of a worker's connection, and return whether its incarnation had said goodbye.

        Without a goodbye the worker is lost, unless it has come back meanwhile.
        """
        with self._changed:
            connections = self._connections[task]
            connections[incarnation] -= 1
            if not connections[incarnation]:
                if not any(_strategy(other) == _strategy(incarnation) for other in +connections):
                    self._processes[task].lose(_strategy(incarnation))
                self._go(task, incarnation, Presence.LOST)
            elif connections[incarnation] < 0:  # the incarnation had left before
                del connections[incarnation]
                return True
            return False

    def expire(self, incarnation: str) -> None:
        """Refuse an incarnation from now on. Its connections are for the caller to end."""
        with self._changed:
            self._expired.add(incarnation)

    def replaced(self, task: str, incarnation: str) -> list[str]:
        """Return the connected incarnations of a task that an incarnation, just joined, has replaced; they expire."""
        with self._changed:
            process, strategy = _process(incarnation), _strategy(incarnation)
            old = [
                other
                for other in +self._connections[task]
                if other != incarnation and (_process(other) != process or _strategy(other) == strategy)
            ]
            self._expired.update(old)
            return old

    def stop(self) -> None:
        """End the waits, because the ps is to end now."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def joined(self, besides: str = "") -> tuple[str, ...]:
        """Return the workers that are connected now."""
        return self._who(Presence.JOINED, besides=besides)

    def absent(self, besides: str = "") -> tuple[str, ...]:
        """Return the workers that are not connected and have not said goodbye: they may still come, or come back."""
        return self._who(Presence.EXPECTED, Presence.LOST, besides=besides)

    def await_alone(self, task: str, timeout: float, *, absent: bool = False) -> tuple[str, ...]:
        """Wait at most ``timeout`` seconds until no worker but ``task`` is connected; return those that still are.

        With ``absent``, workers that may come back are waited for as well.
        """

        def is_alone() -> bool:
            return not self.joined(besides=task) and not (absent and self.absent(besides=task))

        with self._changed:
            self._changed.wait_for(lambda: self._stopped or is_alone(), timeout)
            return self.joined(besides=task)

    def await_company(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until a worker is connected, and return whether one is; not once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or bool(self.joined()), timeout)
            return bool(self.joined()) and not self._stopped

    @property
    def outlook(self) -> Outlook:
        """State of the run at this moment."""
        chief = self._presence.get(self.chief)
        if self.joined() or chief not in (Presence.LEFT, Presence.LOST):
            return Outlook.GOING_ON
        if chief is Presence.LOST or Presence.EXPECTED in self._presence.values():
            return Outlook.ABSENT
        return Outlook.OVER

    def await_over(self, grace: float) -> bool:
        """Block until the run is over; return False if it ended without the chief's goodbye.

        Args:
            grace: Seconds to wait for workers that were never seen, and for a chief that was lost.
        """
        with self._changed:
            while not self._stopped and (outlook := self.outlook) is not Outlook.OVER:
                changed = self._changed.wait(grace if outlook is Outlook.ABSENT else None)
                if not changed and self.outlook is Outlook.ABSENT:  # a worker may have come at the last moment
                    break
            return self._presence.get(self.chief) is Presence.LEFT

    def __str__(self) -> str:
        return ", ".join(f"{task} ({presence.value})" for task, presence in self._presence.items())

    def _who(self, *presences: Presence, besides: str) -> tuple[str, ...]:
        return tuple(task for task, presence in self._presence.items() if presence in presences and task != besides)

    def _number(self, task: str, incarnation: str) -> int:
        name = _process(incarnation)
        process = self._processes.get(task)
        if process is None or process.name != name:  # the task was started again
            process = self._processes[task] = _Process(name)
        return process.number(_strategy(incarnation))

    def _admit(self, task: str, incarnation: str) -> None:
        if incarnation in self._expired:
            raise UnavailableError(
                f"{task} was lost, or another connection has taken its place; what it still sends is refused. "
                "strategy.recover() goes on with the present values",
                task,
            )
        newer = [other for other in map(_process, +self._connections[task]) if other > _process(incarnation)]
        if newer:
            raise RefusedError(
                f"another process that is {task} was started after this one, and takes part in its place; "
                "are two processes started with the same task in TF_CONFIG?",
                task,
            )

    def _go(self, task: str, incarnation: str, presence: Presence) -> None:
        with self._changed:
            self._connections[task].pop(incarnation, None)
            if not self._connections[task]:
                self._presence[task] = presence
            self._changed.notify_all()


def _process(incarnation: str) -> str:
    return incarnation.partition(".")[0]


def _strategy(incarnation: str) -> str:
    return ".".join(incarnation.split(".")[:2])
