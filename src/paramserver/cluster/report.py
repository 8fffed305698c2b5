"""The reports of a task to the launcher that started it: one line of JSON each, over an inherited pipe.

A pipe and not a connection: no task has to listen, the evaluator needs no connection, and a task that dies closes its
end.
"""

from __future__ import annotations

import os

import msgspec


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of one task. Fields that are None are unchanged since the task's last report."""

    task: str
    state: str | None = None
    """State of the task in words: ``training``, ``waiting for the chief``, ``done``."""
    global_step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    updates: int | None = None
    """Number of pushes that a ps task has applied."""
    mean_staleness: float | None = None
    largest_staleness: int | None = None
    evaluation: dict[str, float] | None = None
    """Metrics of one finished evaluation, including ``global_step``."""
    step_seconds: dict[str, float] | None = None
    """Time that the parts of a step of this task take, in seconds, as in ``StepTimes.per_step``."""
    paths: dict[str, str] | None = None
    """Paths of results by kind: ``checkpoint``, ``summaries``, ``export``."""


class Reporter:
    """Writes reports. Without a descriptor it does nothing, so callers need no check.

    One reporter is not thread-safe. Every line is one ``write`` of less than PIPE_BUF bytes, so several reporters of a
    process do not mix their lines. A launcher that has gone away ends the reports, not the task.
    """

    def __init__(self, task: str, descriptor: int | None) -> None:
        self.task = task
        self._descriptor = descriptor

    @property
    def is_on(self) -> bool:
        """Whether a launcher receives the reports; lets a caller skip work that only serves them."""
        return self._descriptor is not None

    def tell(self, **fields: object) -> None:
        """Send one report. Does not block for long.

        Args:
            **fields: The fields of `Report` without ``task``.
        """
        if self._descriptor is None:
            return
        line = msgspec.json.encode(Report(task=self.task, **fields)) + b"\n"  # type: ignore[arg-type]  # checked by Report's readers
        try:
            os.write(self._descriptor, line)
        except OSError:
            self._descriptor = None


def decode(line: bytes) -> Report:
    """Decode one line.

    Raises:
        msgspec.DecodeError: If the line is not a report.
    """
    return msgspec.json.decode(line, type=Report)
