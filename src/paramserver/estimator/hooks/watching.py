"""The hooks that watch a training: its speed, its loss, and whether the loss is still a number.

A *step* is a global step, which counts the updates of all workers, unless it is called *local*.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

import torch

from paramserver.errors import ParameterServerError
from paramserver.estimator.hooks.basic import Clock, SecondOrStepTimer
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession

logger = logging.getLogger(__name__)


class NanLossDuringTrainingError(ParameterServerError):
    """The loss of a worker became NaN; the variables are most likely NaN by now as well.

    Attributes:
        task: The worker that computed the loss.
        global_step: The global step at which the worker noticed it.
    """

    def __init__(self, message: str, task: str, global_step: int) -> None:
        super().__init__(message)
        self.task = task
        self.global_step = global_step


class StepCounterHook(TrainingHook):
    """Logs the number of global steps that all workers together make in a second, from this task's first step on.

    Args:
        every_n_steps: Global steps between two lines; exactly one of the two is given.
        every_n_secs: Seconds between two lines.
        clock: Returns seconds.
    """

    STEPS_WITHOUT_PROGRESS = 20
    """Number of local steps without a change of the global step after which a warning is due."""
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
        """The last rate that was logged; None before the first."""

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Log when due, and warn if the global step does not change."""
        step = values.global_step
        self._watch_progress(step, context.session.task)
        self._log_if_due(step)

    def while_waiting(self, context: RunContext) -> None:
        """Log the speed of the other workers when due."""
        self._log_if_due(context.session.global_step)

    def _log_if_due(self, step: int) -> None:
        if self._timer.should_trigger_for_step(step):
            seconds, steps = self._timer.update_last_triggered_step(step)
            if seconds and steps is not None:
                self.steps_per_second = steps / seconds
                logger.info("global_step/sec: %.4g", self.steps_per_second)

    def _watch_progress(self, step: int, task: str) -> None:
        self._stalled = self._stalled + 1 if step == self._last_step else 0
        self._last_step = step
        due = self._stalled and self._stalled % self.STEPS_WITHOUT_PROGRESS == 0
        if due and self._warnings < self.MAX_WARNINGS:
            self._warnings += 1
            logger.warning(
                "%s made %d steps while the global step stayed at %d: does the optimizer come from "
                "strategy.prepare(), and is optimizer.step() called?",
                task,
                self._stalled,
                step,
            )


class LoggingHook(TrainingHook):
    """Logs the loss, the step and further values, at the first local step and then at intervals of local steps.

    Args:
        every_n_steps: Local steps between two lines. Give exactly one of this and ``every_n_secs``, or neither of them
            to log ``at_end`` only.
        every_n_secs: Seconds between two lines.
        at_end: Whether to log the last step as well.
        values: Functions without arguments, by the name of their result; called when a line is due.
        formatter: Makes the line from all values by name, ``loss`` and ``step`` first.
        clock: Returns seconds.

    Raises:
        ConfigError: If the intervals do not fit together, or one is not positive.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> hook = LoggingHook(every_n_steps=50, values={"lr": lambda: optimizer.param_groups[0]["lr"]})
    """

    def __init__(
        self,
        every_n_steps: int | None = 100,
        every_n_secs: float | None = None,
        *,
        at_end: bool = False,
        values: Mapping[str, Callable[[], object]] | None = None,
        formatter: Callable[[Mapping[str, object]], str] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        is_end_alone = at_end and every_n_steps is None and every_n_secs is None
        self._timer = SecondOrStepTimer(
            every_secs=math.inf if is_end_alone else every_n_secs, every_steps=every_n_steps, clock=clock
        )
        if is_end_alone:
            self._timer.update_last_triggered_step(-1)
        self._at_end = at_end
        self._values = dict(values or {})
        self._formatter = formatter
        self._local_step = 0
        self._unlogged: RunValues | None = None

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Log when due."""
        self._unlogged = values
        if self._timer.should_trigger_for_step(self._local_step):
            self._write(values)
        self._local_step += 1

    def end(self, session: TrainingSession) -> None:
        """Log the last step if that was asked for and is not done yet."""
        if self._at_end and self._unlogged is not None:
            self._write(self._unlogged)

    def _write(self, values: RunValues) -> None:
        seconds, _ = self._timer.update_last_triggered_step(self._local_step)
        shown: dict[str, object] = {"loss": float(values.loss), "step": values.global_step}
        shown |= {name: read() for name, read in self._values.items()}
        if self._formatter is not None:
            logger.info("%s", self._formatter(shown))
        else:
            line = ", ".join(f"{name} = {_text(value)}" for name, value in shown.items())
            logger.info("%s%s", line, "" if seconds is None else f" ({seconds:.3f} sec)")
        self._unlogged = None


def _text(value: object) -> str:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class NanLossHook(TrainingHook):
    """Ends the training when the loss is NaN.

    It checks every step. That causes no additional wait on a GPU: a step has waited for its device already, because its
    gradients went to the ps tasks.

    Args:
        fail_on_nan_loss: Whether to raise; False stops the training cleanly instead.
    """

    def __init__(self, fail_on_nan_loss: bool = True) -> None:
        self._fail = fail_on_nan_loss

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Check the loss of one step.

        Raises:
            NanLossDuringTrainingError: If the loss is NaN, unless ``fail_on_nan_loss`` is False.
        """
        if not math.isnan(float(values.loss)):
            return
        task, step = context.session.task, values.global_step
        message = (
            f"the loss of {task} is NaN at global step {step}; expected a number: "
            "try a lower learning rate or clipped gradients, and look for bad values in the batch; "
            f"started again, training goes on from the latest checkpoint in {context.session.model_dir}"
        )
        if self._fail:
            raise NanLossDuringTrainingError(message, task, step)
        logger.warning("%s; training stops", message)
        context.request_stop()
