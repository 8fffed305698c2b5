"""The consequences of the end of one task for the others. No process or clock: it receives events and returns actions.

Rules
    * The exit code of the run is that of the first task that failed of its own; a task that was told to end cannot
      fail. A task that ends with the code `CONSEQUENCE` says that it ends because of another one.
    * A chief that fails ends the whole run, and so does a ps while any task trains. A worker or an evaluator that fails
      affects no other task.
    * When chief and workers have ended, ps tasks end by themselves; after the grace period they are told to. The grace
      is only `AFTER_FAILURE` if a chief or worker has failed: the ps tasks may be waiting for it.
    * An evaluator gets all the time that it needs.
    * An interrupt ends all tasks, and determines the exit code of the run; a second one kills.
    * Where all tasks are to end, ps tasks are told last, when chief and workers have ended, who may still save.
    * A task that was told to end and has not ended within the shutdown timeout is killed.
    * With restarts, a task that fails is started again after a pause that doubles with each failure. Only failures
      within the restart window count; the task has failed for good when they are more than the restarts.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from paramserver.cluster.exit_codes import CONSEQUENCE
from paramserver.cluster.task import Role, TaskId

AFTER_FAILURE = 1.0
"""Limit for the grace period in seconds, if a chief or worker has failed."""
CULPRIT_WAIT = 5.0
"""Seconds for which a task that failed because of another one does not end the run: the other may just be ending."""
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Limits for the pause before a task is started again, in seconds."""


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
        if self.signal is not None:
            return f"was killed by {signal.Signals(self.signal).name} (code {self.code})"
        if self.code == CONSEQUENCE:
            return f"ended because of another task (code {self.code})"
        if self.code - 128 in (signal.SIGINT, signal.SIGTERM):
            return f"was asked to leave by {signal.Signals(self.code - 128).name} (code {self.code})"
        return f"exited with code {self.code}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a run's end.

    Attributes:
        grace: Seconds that ps tasks get to end by themselves after chief and workers have ended.
        shutdown_timeout: Seconds that a task gets to end after it was told to.
        restarts: Number of failures of a task within the restart window after which it is started again.
        restart_window: Seconds after which a failure does not count any more.
    """

    grace: float = 10.0
    shutdown_timeout: float = 30.0
    restarts: int = 0
    restart_window: float = 3600.0


class Lifecycle:
    """The state of a run's end. Times are seconds of any one monotonic clock.

    Args:
        tasks: All tasks of the run.
        limits: The limits of its end.

    Attributes:
        running: The tasks that run, or will be started again.
        failures: The tasks that failed for good, in order.
        interrupt: The signal by which the user ended the run.
        is_stopping: Whether all tasks are to end, by an interrupt or because of a failure.
        has_finished: Whether the chief has ended well, so that a task that comes later comes after the end.
        remarks: Lines for the user about decisions, which the launcher prints and removes.
    """

    def __init__(self, tasks: Iterable[TaskId], limits: Limits) -> None:
        self.running = set(tasks)
        self.failures: list[tuple[TaskId, Ending]] = []
        self.interrupt: int | None = None
        self.is_stopping = False
        self.has_finished = False
        self.remarks: list[str] = []
        self._limits = limits
        self._deaths: dict[TaskId, list[float]] = {task: [] for task in self.running}
        self._starts: dict[TaskId, float] = {}
        self._due: dict[TaskId, tuple[float, signal.Signals]] = {}
        self._told: set[TaskId] = set()

    def __repr__(self) -> str:
        running = ", ".join(map(str, sorted(self.running)))
        return f"<Lifecycle running: {running or 'none'}; failed: {len(self.failures)}; code: {self.exit_code}>"

    @property
    def has_lost_workers(self) -> bool:
        """Whether a chief or worker has failed for good."""
        return any(task.role.trains for task, _ in self.failures)

    @property
    def culprit(self) -> tuple[TaskId, Ending] | None:
        """The first task that failed of its own, and its end; None if no task failed."""
        own = [failure for failure in self.failures if failure[1].code != CONSEQUENCE]
        return next(iter(own or self.failures), None)

    @property
    def exit_code(self) -> int:
        """The run's exit code, as far as it is known."""
        if self.interrupt is not None:
            return 128 + self.interrupt
        return self.culprit[1].code if self.culprit else 0

    @property
    def summary(self) -> str:
        """One line about the tasks that failed of their own, the culprit first; empty if none failed."""
        if self.culprit is None:
            return ""
        own = [failure for failure in self.failures if failure[1].code != CONSEQUENCE]
        endings = "; ".join(f"{task} {ending}" for task, ending in own or [self.culprit])
        return f"error: {endings}" + ("; the run was stopped" if self.is_stopping else "")

    def ended(self, task: TaskId, ending: Ending, now: float) -> float | None:
        """Note that a task has ended, and return the seconds after which it is started again; None if it is not."""
        failed = bool(ending.code) and task not in self._told
        if failed and (pause := self._pause(task, now)) is not None:
            self._starts[task] = now + pause
            return pause
        self.running.discard(task)
        self._due.pop(task, None)
        self.has_finished |= task.role is Role.CHIEF and not ending.code
        if failed:
            self.failures.append((task, ending))
            if task.role is Role.CHIEF or (task.role is Role.PS and self._is_training):
                self._stop(now + CULPRIT_WAIT if ending.code == CONSEQUENCE else now)
        if not self._is_training:
            self._end_ps_tasks(now)
        return None

    def interrupted(self, number: int, now: float) -> None:
        """Note a signal by which the user, or the process that runs the launcher, wants to end the run."""
        again = self.interrupt is not None
        self.interrupt = number if self.interrupt is None else self.interrupt
        self._stop(now)
        if again:
            self._due = dict.fromkeys(self.running, (now, signal.SIGKILL))
        elif not self._is_training:
            self._end_ps_tasks(now)

    def told_all(self) -> None:
        """Note that every task was told to end, as where tasks cannot be told one by one."""
        self._told |= self.running

    def count(self, task: TaskId) -> str:
        """Return how often a task has failed within the restart window, of how often it may."""
        return f"{len(self._deaths[task])} of {self._limits.restarts}"

    def reason_to_leave(self, task: TaskId) -> str:
        """Return the line about a task that is told to end although nothing is stopping; "" for none."""
        if self.has_lost_workers:
            return ""
        return f"{task} did not end within {self._limits.grace:g} s of the last worker; stopping it"

    def take_starts(self, now: float) -> list[TaskId]:
        """Return the tasks to start again now. Each is returned once for each start."""
        due = [task for task, when in self._starts.items() if when <= now]
        for task in due:
            del self._starts[task]
        return due

    def take_due(self, now: float) -> list[tuple[TaskId, signal.Signals]]:
        """Return the signals to send now. Each is returned once."""
        due = [(task, number) for task, (when, number) in self._due.items() if when <= now]
        for task, number in due:
            del self._due[task]
            self._told.add(task)
            if number is not signal.SIGKILL:
                self._due[task] = (now + self._limits.shutdown_timeout, signal.SIGKILL)
        return due

    def next_due(self) -> float | None:
        """Return the time of the next signal or start, unless something else happens before."""
        return min((*(when for when, _ in self._due.values()), *self._starts.values()), default=None)

    @property
    def _is_training(self) -> bool:
        return any(task.role.trains for task in self.running)

    def _pause(self, task: TaskId, now: float) -> float | None:
        """Return the seconds before a task that has failed is started again; None if it has failed for good."""
        # Nobody would bring back what a ps held after its chief has finished.
        if self.is_stopping or (self.has_finished and task.role is Role.PS):
            return None
        deaths = self._deaths[task] = [when for when in self._deaths[task] if when > now - self._limits.restart_window]
        deaths.append(now)
        if len(deaths) > self._limits.restarts:
            return None
        return min(math.ldexp(FIRST_PAUSE, len(deaths) - 1), LONGEST_PAUSE)

    def _stop(self, when: float) -> None:
        """Let all tasks end from ``when`` on; the ps tasks follow when nobody trains any more."""
        self.is_stopping = True
        self.running -= self._starts.keys()
        self._starts.clear()
        for task in self.running - self._told:
            if task.role is not Role.PS:
                self._due[task] = (when, signal.SIGTERM)

    def _end_ps_tasks(self, now: float) -> None:
        grace = min(self._limits.grace, AFTER_FAILURE) if self.has_lost_workers else self._limits.grace
        when = now if self.is_stopping else now + grace
        for task in self.running - self._told:
            if task.role is Role.PS:
                before, _ = self._due.get(task, (math.inf, signal.SIGTERM))
                self._due[task] = (min(when, before), signal.SIGTERM)
