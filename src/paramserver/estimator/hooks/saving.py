"""The hooks that write into model_dir, on the chief: summaries and checkpoints.

A *step* is a global step, which counts the updates of all workers.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from paramserver.distribute.bound.step_times import StepTimes
from paramserver.errors import CheckpointError, NotFiniteError
from paramserver.estimator.hooks.basic import Clock, SecondOrStepTimer
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession, as_tuple
from paramserver.estimator.uploading import going_on_without
from paramserver.summary import Point, Writer, collecting

logger = logging.getLogger(__name__)


class SummarySaverHook(TrainingHook):
    """Writes summaries for TensorBoard, on the chief: loss, staleness, speed, times, and the model's own records.

    In the steps that it writes, it collects the points that the model's code records with `paramserver.summary`; in all
    other steps those calls do nothing. All points of a step have the global step of its update. A ``loss`` that the
    code records itself replaces the hook's. ``staleness`` is that of all of this task's pushes since the last time;
    ``milliseconds/`` is the time of its steps since then, by use. The hook does not close the writer.

    Points that cannot be written are an error in the log, and the training goes on: the next ones are tried when they
    are due.

    Args:
        writer: The writer of the summaries.
        save_steps: Global steps between two points; exactly one of the two is given.
        save_secs: Seconds between two points.
        clock: Returns seconds.

    Attributes:
        failures: How often points could not be written.

    Raises:
        ConfigError: If not exactly one interval is given, or it is not positive.
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
        self.failures = 0
        self._is_due = False
        self._points: list[Point] = []
        self._staleness: Counter[int] = Counter()
        self._times: StepTimes | None = None

    def before_run(self, context: RunContext) -> None:
        """Record the coming step if it is the first, or if it is due."""
        session = context.session
        self._is_due = session.is_chief and self._timer.should_trigger_for_step(session.global_step + 1)
        if self._is_due:
            self._points.clear()
            context.wrap_step(collecting(self._points.append))

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Write the recorded points."""
        self._staleness[values.staleness] += 1
        if self._is_due:
            with self._going_on(values.global_step):
                self._write(values)
                self._write_times(context.session.statistics(), values.global_step)

    def while_waiting(self, context: RunContext) -> None:
        """Write the speed of the other workers when due; this task has no more losses of its own."""
        session = context.session
        if session.is_chief and self._timer.should_trigger_for_step(session.global_step):
            with self._going_on(session.global_step):
                self._write_speed(session.global_step)

    def end(self, session: TrainingSession) -> None:
        """Make all points visible."""
        with self._going_on(session.global_step):
            self._writer.flush()

    @contextlib.contextmanager
    def _going_on(self, step: int) -> Iterator[None]:
        """Go on if points cannot be written; the next ones are tried when they are due."""
        with going_on_without(f"summaries of step {step}") as failed:
            yield
        if failed:
            self.failures += 1
            self._timer.update_last_triggered_step(step)

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
        """Write the number of steps a second since the last time."""
        seconds, steps = self._timer.update_last_triggered_step(step)
        if seconds and steps is not None:
            self._writer.scalar("global_step/sec", steps / seconds, step)

    def _write_times(self, times: StepTimes, step: int) -> None:
        """Write the mean milliseconds of a step since the last time, in a group of their own."""
        since = times.since(self._times) if self._times else times
        for name, seconds in since.per_step().items():
            self._writer.scalar(f"milliseconds/{name}", seconds * 1e3, step)
        self._times = times


class CheckpointSaverListener:
    """Code that is called for every checkpoint of a `CheckpointSaverHook`. Override the methods you need."""

    def begin(self) -> None:
        """Called before the session is created."""

    def before_save(self, session: TrainingSession, step: int) -> None:
        """Called before a checkpoint of ``step`` is written."""

    def after_save(self, session: TrainingSession, step: int) -> bool | None:
        """Called when a checkpoint of ``step`` is complete. Return True to stop the training."""

    def end(self, session: TrainingSession, step: int) -> None:
        """Called when the training has ended cleanly at ``step``, after its checkpoint."""


class CheckpointSaverHook(TrainingHook):
    """Saves when the session starts, after each interval of global steps or seconds, and at the end.

    A checkpoint that cannot be written is an error in the log, and the training goes on: the next one is tried when it
    is due. Only if the last one cannot be written, the training fails.

    A chief that is asked to leave, by SIGTERM or Ctrl-C, saves as well.

    Once the step to stop at is reached, only the end saves: workers may still be in their last steps, and the
    checkpoint that an evaluator regards as the last one should contain these.

    Args:
        save_secs: Seconds between two checkpoints; exactly one of the two is given.
        save_steps: Global steps between two checkpoints.
        listeners: Called for every checkpoint.
        clock: Returns seconds.

    Attributes:
        failures: Number of checkpoints that could not be written.

    Raises:
        ConfigError: If not exactly one interval is given, or it is not positive.
        TypeError: If a listener is not a CheckpointSaverListener.
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
        self.failures = 0
        self._saved_step: int | None = None
        self._stop = False

    def with_listeners(self, more: Sequence[CheckpointSaverListener]) -> CheckpointSaverHook:
        """Return a copy of this hook that also calls ``more`` listeners; the hook itself if there are none."""
        if not more:
            return self
        new = copy.copy(self)
        new.listeners = (*self.listeners, *more)
        return new

    def begin(self) -> None:
        """Call ``begin`` of the listeners."""
        for listener in self.listeners:
            listener.begin()

    def after_create_session(self, session: TrainingSession) -> None:
        """Save the start of the training. A stop that a listener asks for here follows the first step."""
        if not session.should_stop():
            self._save(session)

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Save when due, and stop if a listener asks for it."""
        self._save_if_due(context.session, values.global_step)
        if self._stop:
            context.request_stop()

    def while_waiting(self, context: RunContext) -> None:
        """Save the other workers' updates when due."""
        self._save_if_due(context.session, context.session.global_step)

    def end(self, session: TrainingSession) -> None:
        """Save the last step if it is not saved yet.

        Raises:
            CheckpointError: If it cannot be written.
        """
        if session.global_step != self._saved_step:
            self._write(session)
        for listener in self.listeners:
            listener.end(session, session.global_step)

    def leave(self, session: TrainingSession) -> None:
        """Save the present step, for a chief that is asked to leave."""
        if session.is_chief:
            logger.info("%s is asked to leave: saved a checkpoint to %s", session.task, session.save())

    def _save_if_due(self, session: TrainingSession, step: int) -> None:
        if self._timer.should_trigger_for_step(step) and not session.should_stop():
            self._save(session)

    def _save(self, session: TrainingSession) -> None:
        """Save, or say why that is not possible now."""
        try:
            self._write(session)
        except NotFiniteError:  # no fault of the storage: no later checkpoint would be any better
            raise
        except CheckpointError as error:
            self.failures += 1
            # As text: a kept record must not keep the tensors in the frames of the error's traceback.
            logger.error(
                "no checkpoint of step %d: %s; the training goes on, and tries again when the next is due (failure %d)",
                *(session.global_step, str(error), self.failures),
            )

    def _write(self, session: TrainingSession) -> None:
        step = session.global_step
        self._timer.update_last_triggered_step(step)
        for listener in self.listeners:
            listener.before_save(session, step)
        path = session.save()
        self._saved_step = step
        step = session.global_step  # other workers may have made updates before the checkpoint was begun
        logger.info("saved a checkpoint of step %d to %s", step, path)
        for listener in self.listeners:
            # All listeners are called, also those after the first that asks for a stop.
            self._stop = bool(listener.after_save(session, step)) or self._stop
