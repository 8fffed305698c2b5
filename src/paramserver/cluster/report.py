"""What a task tells the launcher that started it: one JSON line a report, over an inherited pipe.

A pipe and not a connection: nobody has to listen, the evaluator stays connected to nobody, and a task that
dies says so by closing it.
"""

from __future__ import annotations

import os

import msgspec


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of one task. Fields that are None are unchanged since the task's last report."""

    task: str
    state: str | None = None
    """What the task does, in words: ``training``, ``waiting for the chief``, ``done``."""
    global_step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    updates: int | None = None
    """Pushes that a ps task has applied."""
    mean_staleness: float | None = None
    largest_staleness: int | None = None
    evaluation: dict[str, float] | None = None
    """Metrics of one finished evaluation, ``global_step`` among them."""
    step_seconds: dict[str, float] | None = None
    """Where the time of a step of this task has gone, in seconds: as ``StepTimes.per_step`` has it."""
    paths: dict[str, str] | None = None
    """Where results lie, by what they are: ``checkpoint``, ``summaries``, ``export``."""


class Reporter:
    """Writes reports. Without a descriptor it does nothing, so callers need not ask.

    Not thread-safe for one reporter; every line is one ``write`` of less than PIPE_BUF bytes, so several
    reporters of one process do not mix their lines. A launcher that has gone away ends the reports, not
    the task.
    """

    def __init__(self, task: str, descriptor: int | None) -> None:
        self.task = task
        self._descriptor = descriptor

    @property
    def is_on(self) -> bool:
        """Whether anyone listens; lets a caller skip work that only serves a report."""
        return self._descriptor is not None

    def tell(self, **fields: object) -> None:
        """Send one report; the fields are those of `Report` without ``task``. Does not block for long."""
        if self._descriptor is None:
            return
        line = msgspec.json.encode(Report(task=self.task, **fields)) + b"\n"  # type: ignore[arg-type]  # checked by Report's readers
        try:
            os.write(self._descriptor, line)
        except OSError:
            self._descriptor = None


def decode(line: bytes) -> Report:
    """One line as a report. Raises msgspec.DecodeError where it is none."""
    return msgspec.json.decode(line, type=Report)
