"""The hooks that write into model_dir, on the chief: summaries and checkpoints.

A *step* is a global step, the updates of all workers.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Sequence

import torch

from paramserver.distribute.bound.step_times import StepTimes
from paramserver.estimator.hooks.basic import Clock, SecondOrStepTimer
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession, as_tuple
from paramserver.summary import Point, Writer, collecting

_log = logging.getLogger(__name__)


class SummarySaverHook(TrainingHook):
    """Writes summaries for TensorBoard, on the chief: loss, staleness, speed, times, and what the model records.

    In the steps that it writes it takes what the model's code records with `paramserver.summary`; in all others those
    calls do nothing. All points of a step have the global step of its update. A ``loss`` that the code records itself
    stands in for the loss. ``staleness`` is that of all of this task's pushes since the last time;
    ``milliseconds/`` is where the time of its steps has gone since then. Closes nothing.

    Args:
        writer: Where they go.
        save_steps: Global steps between two points; exactly one of the two is given.
        save_secs: Seconds between two points.
        clock: Returns seconds.

    Raises:
        ConfigError: If both or none are given, or one is not positive.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        save_steps: int | None = None,
        save_secs: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._timer = SecondOrStepTimer(every_secs=save_secs, every_steps=save_steps, clock=clock)
        self._writer = writer
        self._is_due = False
        self._points: list[Point] = []
        self._staleness: Counter[int] = Counter()
        self._times: StepTimes | None = None

    def before_run(self, context: RunContext) -> None:
        """Has the first step recorded, then those that are due."""
        session = context.session
        self._is_due = session.is_chief and self._timer.should_trigger_for_step(session.global_step + 1)
        if self._is_due:
            self._points.clear()
            context.wrap_step(collecting(self._points.append))

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Writes what was recorded."""
        self._staleness[values.staleness] += 1
        if self._is_due:
            self._write(values)
            self._write_times(context.session.statistics(), values.global_step)

    def while_waiting(self, context: RunContext) -> None:
        """Writes the speed of the other workers when due; a loss of its own this task has no more."""
        session = context.session
        if session.is_chief and self._timer.should_trigger_for_step(session.global_step):
            self._write_speed(session.global_step)

    def end(self, session: TrainingSession) -> None:
        """Makes all points visible."""
        self._writer.flush()

    def _write(self, values: RunValues) -> None:
        step = values.global_step
        if all(point.name != "loss" for point in self._points):
            self._writer.scalar("loss", float(values.loss), step)
        for point in self._points:
            point.write(self._writer, step)
        self._writer.histogram("staleness", torch.tensor(list(self._staleness.elements()), dtype=torch.float32), step)
        self._write_speed(step)
        self._points.clear()
        self._staleness.clear()

    def _write_speed(self, step: int) -> None:
        """Steps a second since the last time."""
        seconds, steps = self._timer.update_last_triggered_step(step)
        if seconds and steps is not None:
            self._writer.scalar("global_step/sec", steps / seconds, step)

    def _write_times(self, times: StepTimes, step: int) -> None:
        """Mean milliseconds of a step since the last time, in a group of their own."""
        since = times.since(self._times) if self._times else times
        for name, seconds in since.per_step().items():
            self._writer.scalar(f"milliseconds/{name}", seconds * 1e3, step)
        self._times = times


class CheckpointSaverListener:
    """Told about every checkpoint that a `CheckpointSaverHook` writes. Override what you need."""

    def begin(self) -> None:
        """Before the session is created."""

    def before_save(self, session: TrainingSession, step: int) -> None:
        """A checkpoint of ``step`` is about to be written."""

    def after_save(self, session: TrainingSession, step: int) -> bool | None:
        """A checkpoint of ``step`` is whole. Return True to stop the training."""

    def end(self, session: TrainingSession, step: int) -> None:
        """The training ended cleanly at ``step``; its checkpoint is written."""


class CheckpointSaverHook(TrainingHook):
    """Saves when the session starts, every so many global steps or seconds, and at the end.

    From the step to stop at on only the end saves: workers may still be in their last steps, and what an evaluator
    takes for the last checkpoint should hold these.

    Args:
        save_secs: Seconds between two checkpoints; exactly one of the two is given.
        save_steps: Global steps between two checkpoints.
        listeners: Told about every checkpoint.
        clock: Returns seconds.

    Raises:
        ConfigError: If both or none are given, or one is not positive.
        TypeError: If a listener is none.
    """

    def __init__(
        self,
        *,
        save_secs: float | None = None,
        save_steps: int | None = None,
        listeners: Sequence[CheckpointSaverListener] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        self._timer = SecondOrStepTimer(every_secs=save_secs, every_steps=save_steps, clock=clock)
        self.listeners = as_tuple(listeners, CheckpointSaverListener, "CheckpointSaverHook: listeners")
        self._stop = False

    def with_listeners(self, more: Sequence[CheckpointSaverListener]) -> CheckpointSaverHook:
        """A copy of this hook that tells ``more`` listeners, too; the hook itself if there are none."""
        if not more:
            return self
        new = copy.copy(self)
        new.listeners = (*self.listeners, *more)
        return new

    def begin(self) -> None:
        """Tells the listeners."""
        for listener in self.listeners:
            listener.begin()

    def after_create_session(self, session: TrainingSession) -> None:
        """Saves what training starts from; a stop that a listener asks for here follows the first step."""
        if not session.should_stop():
            self._save(session)

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Saves when due, and stops if a listener wants it."""
        self._save_if_due(context.session, values.global_step)
        if self._stop:
            context.request_stop()

    def while_waiting(self, context: RunContext) -> None:
        """Saves when due what the other workers do."""
        self._save_if_due(context.session, context.session.global_step)

    def end(self, session: TrainingSession) -> None:
        """Saves the last step if it is not saved yet."""
        if session.global_step != self._timer.last_triggered_step:
            self._save(session)
        for listener in self.listeners:
            listener.end(session, session.global_step)

    def _save_if_due(self, session: TrainingSession, step: int) -> None:
        if self._timer.should_trigger_for_step(step) and not session.should_stop():
            self._save(session)

    def _save(self, session: TrainingSession) -> None:
        step = session.global_step
        self._timer.update_last_triggered_step(step)
        for listener in self.listeners:
            listener.before_save(session, step)
        path = session.save()
        step = session.global_step  # other workers may have moved it until the checkpoint was begun
        _log.info("saved a checkpoint of step %d to %s", step, path)
        for listener in self.listeners:
            # All are told, also after the first that wants to stop.
            self._stop = bool(listener.after_save(session, step)) or self._stop
