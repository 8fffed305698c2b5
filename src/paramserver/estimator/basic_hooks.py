"""The hooks that a training has of itself: stopping, logging, summaries, checkpoints, a look at the loss.

Clocks are callables that return seconds, so that a test needs no waiting. A *step* in this file is a global
step, the updates of all workers, unless it says *local*.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from paramserver.errors import ConfigError, ParameterServerError
from paramserver.estimator.hooks import RunContext, RunValues, TrainingHook, TrainingSession, as_tuple

Clock = Callable[[], float]

_log = logging.getLogger(__name__)


class NanLossDuringTrainingError(ParameterServerError):
    """The loss of a worker became NaN; the variables are most likely NaN by now as well.

    Attributes:
        task: The worker whose loss it was.
        global_step: The global step at which it was seen.
    """

    def __init__(self, message: str, task: str, global_step: int) -> None:
        super().__init__(message)
        self.task = task
        self.global_step = global_step


class ScalarWriter(Protocol):
    """Where summaries go; `SummaryWriter` is one."""

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point to the curve ``tag``."""

    def flush(self) -> None:
        """Make what was added visible to readers."""


class SecondOrStepTimer:
    """Says when something is due that happens every so many seconds or steps.

    The first question is always answered yes, and never two for the same step.

    Args:
        every_secs: Seconds between two triggers; exactly one of the two is given.
        every_steps: Steps between two triggers.
        clock: Returns seconds that never go back.

    Raises:
        ConfigError: If both or none are given, or one is not positive.
    """

    def __init__(
        self,
        *,
        every_secs: float | None = None,
        every_steps: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        _check_exactly_one("SecondOrStepTimer", every_secs=every_secs, every_steps=every_steps)
        self._every_secs = every_secs
        self._every_steps = every_steps
        self._clock = clock
        self._last_time: float | None = None
        self.last_triggered_step: int | None = None
        """The step of the last `update_last_triggered_step`, None before the first."""

    def should_trigger_for_step(self, step: int) -> bool:
        """Whether it is due at ``step``. Changes nothing."""
        if self.last_triggered_step is None or self._last_time is None:
            return True
        if step == self.last_triggered_step:
            return False
        if self._every_secs is not None:
            return self._clock() >= self._last_time + self._every_secs
        return self._every_steps is not None and step >= self.last_triggered_step + self._every_steps

    def update_last_triggered_step(self, step: int) -> tuple[float | None, int | None]:
        """It was done at ``step``. Returns the seconds and steps since the last time, None the first time."""
        now = self._clock()
        elapsed_secs = None if self._last_time is None else now - self._last_time
        elapsed_steps = None if self.last_triggered_step is None else step - self.last_triggered_step
        self._last_time, self.last_triggered_step = now, step
        return elapsed_secs, elapsed_steps


class StopAtStepHook(TrainingHook):
    """Stops the training at a global step.

    Args:
        num_steps: Stop this many steps after the one that the session starts from.
        last_step: Stop at this step; exactly one of the two is given.

    Raises:
        ConfigError: If both or none are given, or one is not positive.
    """

    def __init__(self, num_steps: int | None = None, last_step: int | None = None) -> None:
        _check_exactly_one("StopAtStepHook", num_steps=num_steps, last_step=last_step)
        self._num_steps = num_steps
        self.last_step = last_step
        """The step to stop at; None until the session tells where ``num_steps`` counts from."""

    def after_create_session(self, session: TrainingSession) -> None:
        """Counts ``num_steps`` from the first session, not anew from a recreated one."""
        if self.last_step is None and self._num_steps is not None:
            self.last_step = session.global_step + self._num_steps

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Other workers move the step as well, so the session's own count is asked, too."""
        if self.last_step is None:
            return
        if values.global_step >= self.last_step or context.session.global_step >= self.last_step:
            context.request_stop()


class StepCounterHook(TrainingHook):
    """Logs how many global steps all workers together make in a second.

    Args:
        every_n_steps: Global steps between two lines; exactly one of the two is given.
        every_n_secs: Seconds between two lines.
        clock: Returns seconds.
    """

    STEPS_WITHOUT_PROGRESS = 20
    """After so many local steps in which the global step stood still, a warning is due."""
    MAX_WARNINGS = 5

    def __init__(
        self,
        every_n_steps: int | None = 100,
        every_n_secs: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._timer = SecondOrStepTimer(every_secs=every_n_secs, every_steps=every_n_steps, clock=clock)
        self._last_step: int | None = None
        self._stalled = 0
        self._warnings = 0
        self.steps_per_second: float | None = None
        """The last rate that was logged, None before the first."""

    def after_create_session(self, session: TrainingSession) -> None:
        """The first interval begins here, so that the first line counts every step."""
        self._timer.update_last_triggered_step(session.global_step)

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Logs when due, warns where the step stands still."""
        step = values.global_step
        self._watch_progress(step, context.session.task)
        if self._timer.should_trigger_for_step(step):
            seconds, steps = self._timer.update_last_triggered_step(step)
            if seconds and steps is not None:
                self.steps_per_second = steps / seconds
                _log.info("global_step/sec: %.4g", self.steps_per_second)

    def _watch_progress(self, step: int, task: str) -> None:
        self._stalled = self._stalled + 1 if step == self._last_step else 0
        self._last_step = step
        due = self._stalled and self._stalled % self.STEPS_WITHOUT_PROGRESS == 0
        if due and self._warnings < self.MAX_WARNINGS:
            self._warnings += 1
            _log.warning(
                "%s made %d steps while the global step stayed at %d: does the optimizer come from "
                "strategy.prepare(), and is optimizer.step() called?",
                task,
                self._stalled,
                step,
            )


class LoggingHook(TrainingHook):
    """Logs the loss and the step, at the first local step and every so many local steps or seconds.

    Args:
        every_n_steps: Local steps between two lines; exactly one of the two is given.
        every_n_secs: Seconds between two lines.
        at_end: Log the last step as well.
        clock: Returns seconds.
    """

    def __init__(
        self,
        every_n_steps: int | None = 100,
        every_n_secs: float | None = None,
        *,
        at_end: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._timer = SecondOrStepTimer(every_secs=every_n_secs, every_steps=every_n_steps, clock=clock)
        self._at_end = at_end
        self._local_step = 0
        self._unlogged: RunValues | None = None

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Logs when due."""
        self._unlogged = values
        if self._timer.should_trigger_for_step(self._local_step):
            self._write(values)
        self._local_step += 1

    def end(self, session: TrainingSession) -> None:
        """Logs the last step if that was asked for and not done yet."""
        if self._at_end and self._unlogged is not None:
            self._write(self._unlogged)

    def _write(self, values: RunValues) -> None:
        seconds, _ = self._timer.update_last_triggered_step(self._local_step)
        after = "" if seconds is None else f" ({seconds:.3f} sec)"
        _log.info("loss = %.6g, step = %d%s", float(values.loss), values.global_step, after)
        self._unlogged = None


class NanLossHook(TrainingHook):
    """Ends the training when the loss is NaN.

    It looks at every step. That costs no wait of its own on a GPU: a step has waited for its device already,
    because its gradients went to the ps tasks.

    Args:
        fail_on_nan_loss: False stops the training cleanly instead of raising.
    """

    def __init__(self, fail_on_nan_loss: bool = True) -> None:
        self._fail = fail_on_nan_loss

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Checks one loss.

        Raises:
            NanLossDuringTrainingError: If it is NaN, unless ``fail_on_nan_loss`` is False.
        """
        if not math.isnan(float(values.loss)):
            return
        task, step = context.session.task, values.global_step
        message = (
            f"the loss of {task} is NaN at global step {step}; expected a number: "
            "try a lower learning rate or clipped gradients, and look for bad values in the batch"
        )
        if self._fail:
            raise NanLossDuringTrainingError(message, task, step)
        _log.warning("%s; training stops", message)
        context.request_stop()


class SummarySaverHook(TrainingHook):
    """Writes the loss, the staleness and the speed of the run for TensorBoard. Closes nothing.

    Args:
        writer: Where they go.
        save_steps: Global steps between two points; exactly one of the two is given.
        save_secs: Seconds between two points.
        clock: Returns seconds.
    """

    def __init__(
        self,
        writer: ScalarWriter,
        *,
        save_steps: int | None = None,
        save_secs: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._timer = SecondOrStepTimer(every_secs=save_secs, every_steps=save_steps, clock=clock)
        self._writer = writer

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Writes at the first step, then when due."""
        step = values.global_step
        if not self._timer.should_trigger_for_step(step):
            return
        seconds, steps = self._timer.update_last_triggered_step(step)
        self._writer.scalar("loss", float(values.loss), step)
        self._writer.scalar("staleness", values.staleness, step)
        if seconds and steps is not None:
            self._writer.scalar("global_step/sec", steps / seconds, step)

    def end(self, session: TrainingSession) -> None:
        """Makes all points visible."""
        self._writer.flush()


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
        self._save(session)

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Saves when due, and stops if a listener wants it."""
        if self._timer.should_trigger_for_step(values.global_step):
            self._save(context.session)
        if self._stop:
            context.request_stop()

    def end(self, session: TrainingSession) -> None:
        """Saves the last step if it is not saved yet."""
        if session.global_step != self._timer.last_triggered_step:
            self._save(session)
        for listener in self.listeners:
            listener.end(session, session.global_step)

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


def _check_exactly_one(where: str, **options: float | None) -> None:
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        got = "both" if given else "none"
        raise ConfigError(f"{where}: expected exactly one of {' and '.join(options)}, got {got}")
    for name, value in given.items():
        if not value > 0:
            raise ConfigError(f"{where}: {name}: expected a positive number, got {value!r}")
