"""The consequences of the end of one task for the others. No process or clock: it receives events and returns actions.

Rules
    * The exit code of the run is that of the first task that failed; a task that was told to end cannot fail.
    * A chief that fails ends the whole run, and so does a ps while any task trains. A worker or an evaluator that fails
      affects no other task.
    * When chief and workers have ended, ps tasks end by themselves; after the grace period they are told to. The grace
      is only `AFTER_FAILURE` if a chief or worker has failed: the ps tasks may be waiting for it.
    * An evaluator gets all the time that it needs.
    * An interrupt ends all tasks, and determines the exit code of the run; a second one kills.
    * A task that was told to end and has not ended `KILL_AFTER` seconds later is killed.
    * With restarts, a task that fails is started again, and counts as failed only after it has used them up.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass

from paramserver.cluster.task import Role, TaskId

KILL_AFTER = 3.0
"""Seconds between asking a task to end and killing it."""
AFTER_FAILURE = 1.0
"""Limit for the grace period in seconds, if a chief or worker has failed."""


@dataclass(frozen=True)
class Ending:
    """The end of a task.

    Attributes:
        code: Its exit code as a shell reports it, 128 + N after a death by signal N.
        signal: The signal that killed it, if any.
    """

    code: int
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exited with code {self.code}"
        return f"was killed by {signal.Signals(self.signal).name} (code {self.code})"


class Lifecycle:
    """The state of a run's end. Times are seconds of any one monotonic clock."""

    def __init__(self, tasks: Iterable[TaskId], grace: float, restarts: int = 0) -> None:
        self.running = set(tasks)
        self.restarts_left = dict.fromkeys(self.running, restarts)
        self.failures: list[tuple[TaskId, Ending]] = []
        self.interrupt: int | None = None
        """The signal by which the user ended the run."""
        self._grace = grace
        self._due: dict[TaskId, tuple[float, signal.Signals]] = {}
        self._told: set[TaskId] = set()
        self._chief_has_finished = False
        self.is_stopping = False
        """Whether all tasks are to end, by an interrupt or because of a failure."""

    def __repr__(self) -> str:
        running = ", ".join(map(str, sorted(self.running)))
        return f"<Lifecycle running: {running or 'none'}; failed: {len(self.failures)}; code: {self.exit_code}>"

    @property
    def has_lost_workers(self) -> bool:
        """Whether a chief or worker has failed for good."""
        return any(task.role.trains for task, _ in self.failures)

    @property
    def exit_code(self) -> int:
        """The run's exit code, as far as it is known."""
        if self.interrupt is not None:
            return 128 + self.interrupt
        return self.failures[0][1].code if self.failures else 0

    @property
    def summary(self) -> str:
        """One line about the tasks that failed; empty if none did."""
        if not self.failures:
            return ""
        endings = "; ".join(f"{task} {ending}" for task, ending in self.failures)
        return f"error: {endings}" + ("; the run was stopped" if self.is_stopping else "")

    def ended(self, task: TaskId, ending: Ending, now: float) -> bool:
        """Note that a task has ended, and return whether to start it again."""
        if ending.code and task not in self._told and self.restarts_left[task] and self._is_of_use(task):
            self.restarts_left[task] -= 1
            return True
        self.running.discard(task)
        self._due.pop(task, None)
        self._chief_has_finished |= task.role is Role.CHIEF
        trains = any(other.role.trains for other in self.running)
        if ending.code and task not in self._told:
            self.failures.append((task, ending))
            if task.role is Role.CHIEF or (task.role is Role.PS and trains):
                self._stop(now)
        if not self.is_stopping and not trains:
            grace = min(self._grace, AFTER_FAILURE) if self.has_lost_workers else self._grace
            for other in self.running:
                if other.role is Role.PS and other not in self._told:
                    self._due.setdefault(other, (now + grace, signal.SIGTERM))
        return False

    def interrupted(self, number: int, now: float) -> None:
        """Note a signal by which the user, or the process that runs the launcher, wants to end the run."""
        again = self.interrupt is not None
        self.interrupt = number if self.interrupt is None else self.interrupt
        self._stop(now)
        if again:
            self._due = dict.fromkeys(self.running, (now, signal.SIGKILL))

    def take_due(self, now: float) -> list[tuple[TaskId, signal.Signals]]:
        """Return the signals to send now. Each is returned once."""
        due = [(task, number) for task, (when, number) in self._due.items() if when <= now]
        for task, number in due:
            del self._due[task]
            self._told.add(task)
            if number is not signal.SIGKILL:
                self._due[task] = (now + KILL_AFTER, signal.SIGKILL)
        return due

    def next_due(self) -> float | None:
        """Return the time when `take_due` will next return a signal, unless something else happens before."""
        return min((when for when, _ in self._due.values()), default=None)

    def _is_of_use(self, task: TaskId) -> bool:
        """Return whether a task still has work to do; a ps has none after its chief has finished."""
        return not self.is_stopping and not (self._chief_has_finished and task.role is Role.PS)

    def _stop(self, now: float) -> None:
        self.is_stopping = True
        for task in self.running - self._told:
            self._due[task] = (now, signal.SIGTERM)
