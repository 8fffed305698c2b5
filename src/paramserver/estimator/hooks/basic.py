"""The hooks that decide when a session continues and when it stops, and the timer that most hooks use.

Clocks are callables that return seconds, so that a test needs no waiting. A *step* is a global step, which counts the
updates of all workers, unless it is called *local*.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from paramserver.distribute.core.nest import leaves, map_leaves
from paramserver.errors import ConfigError
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession

Clock = Callable[[], float]
Wait = Callable[[float], object]

logger = logging.getLogger(__name__)


class SecondOrStepTimer:
    """Decides when an action is due that repeats after a number of seconds or steps.

    The action is due at the first step that is asked about, and never twice at the same step.

    Args:
        every_secs: Seconds between two triggers; exactly one of the two is given.
        every_steps: Steps between two triggers.
        clock: Returns seconds that never go back.

    Raises:
        ConfigError: If not exactly one interval is given, or it is not positive.
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
        """The step of the last `update_last_triggered_step`; None before the first."""

    def should_trigger_for_step(self, step: int) -> bool:
        """Return whether the action is due at ``step``. Changes nothing."""
        if self.last_triggered_step is None or self._last_time is None:
            return True
        if step == self.last_triggered_step:
            return False
        if self._every_secs is not None:
            return self._clock() >= self._last_time + self._every_secs
        return self._every_steps is not None and step >= self.last_triggered_step + self._every_steps

    def update_last_triggered_step(self, step: int) -> tuple[float | None, int | None]:
        """Note that the action was done at ``step``; return seconds and steps since the last time, or Nones."""
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
        ConfigError: If not exactly one step is given, or it is not positive.
    """

    def __init__(self, num_steps: int | None = None, last_step: int | None = None) -> None:
        _check_exactly_one("StopAtStepHook", num_steps=num_steps, last_step=last_step)
        self._num_steps = num_steps
        self.last_step = last_step
        """The step to stop at; None until a session provides the start for ``num_steps``."""

    def after_create_session(self, session: TrainingSession) -> None:
        """Count ``num_steps`` from the first session, not again from a recreated one."""
        if self.last_step is None and self._num_steps is not None:
            self.last_step = session.global_step + self._num_steps

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Request a stop at the step; the session's own count includes later updates of other workers."""
        if self.last_step is None:
            return
        if values.global_step >= self.last_step or context.session.global_step >= self.last_step:
            context.request_stop()


def _let_time_pass(seconds: float) -> None:
    threading.Event().wait(seconds)


class GlobalStepWaiterHook(TrainingHook):
    """Holds a worker back before its first step until the other workers have reached a global step.

    Starting workers one after the other makes the first updates, which are the largest, less stale. The worker starts
    with the values of the step that it waited for. If the session should stop because `max_steps` is reached, the
    worker goes on and finds that out. A run may also end before the step is reached, by early stopping or because the
    chief's input ends, and the chief would then wait for this worker: in such cases give a ``timeout``.

    Args:
        wait_until_step: The global step; with 0 the worker does not wait.
        timeout: Seconds after which the worker starts anyway, with a warning; None waits without a limit.
        clock: Returns seconds.
        wait: Waits for a number of seconds.

    Raises:
        ConfigError: If the step is negative or not a whole number, or the timeout is not positive.
    """

    POLL_INTERVAL = 0.5
    """Seconds between two requests for the global step."""
    LOG_INTERVAL = 30.0

    def __init__(
        self,
        wait_until_step: int,
        *,
        timeout: float | None = None,
        clock: Clock = time.monotonic,
        wait: Wait = _let_time_pass,
    ) -> None:
        if not isinstance(wait_until_step, int) or isinstance(wait_until_step, bool) or wait_until_step < 0:
            raise ConfigError(
                f"GlobalStepWaiterHook: wait_until_step: expected a whole number of at least 0, got {wait_until_step!r}"
            )
        if timeout is not None and not is_positive(timeout):
            raise ConfigError(f"GlobalStepWaiterHook: timeout: expected positive seconds or None, got {timeout!r}")
        self._step = wait_until_step
        self._timeout = timeout
        self._clock = clock
        self._wait = wait
        self._has_started = False

    def before_run(self, context: RunContext) -> None:
        """Wait before the first step. Blocks; later steps pass at once."""
        if self._has_started:
            return
        if context.session.global_step < self._step:
            self._await(context.session)
            context.session.refresh()
        self._has_started = True

    def _await(self, session: TrainingSession) -> None:
        began = say_at = self._clock()
        while (step := session.read_global_step()) < self._step and not session.should_stop():
            now = self._clock()
            if self._timeout is not None and now >= began + self._timeout:
                logger.warning(
                    "%s starts at global step %d: step %d did not come within %g s",
                    session.task,
                    step,
                    self._step,
                    self._timeout,
                )
                return
            if now >= say_at:
                logger.info("%s waits for global step %d, now %d", session.task, self._step, step)
                say_at = now + self.LOG_INTERVAL
            self._wait(self.POLL_INTERVAL)


class StopAfterNEvalsHook(TrainingHook):
    """Ends an evaluation after a number of batches, counted for each evaluation anew.

    Args:
        num_evals: Number of batches; None lets the input end the evaluation.
        log_progress: Whether to log progress, about ten times in an evaluation.

    Raises:
        ConfigError: If the number is not positive.
    """

    def __init__(self, num_evals: int | None, *, log_progress: bool = True) -> None:
        if num_evals is not None and not is_positive(num_evals):
            raise ConfigError(f"StopAfterNEvalsHook: num_evals: expected a positive number or None, got {num_evals!r}")
        self._num_evals = num_evals
        self._log_every = max((num_evals or 100) // 10, 1) if log_progress else 0
        self._count = 0

    def begin(self) -> None:
        """Start to count the batches of an evaluation."""
        self._count = 0

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Count one batch."""
        self._count += 1
        is_last = self._count == self._num_evals
        if self._log_every and (is_last or self._count % self._log_every == 0):
            logger.info("evaluation [%d/%s]", self._count, self._num_evals or "?")
        if is_last:
            context.request_stop()


class FinalOpsHook(TrainingHook):
    """Calls functions when the session ends cleanly, and keeps their results.

    Args:
        final_ops: A function without arguments, or a nest of such functions.

    Raises:
        TypeError: If a leaf of the nest is not a function.

    >>> hook = FinalOpsHook({"ratio": lambda: 1 / 4})
    """

    def __init__(self, final_ops: Any) -> None:
        for leaf in leaves(final_ops):
            if not callable(leaf):
                raise TypeError(f"FinalOpsHook: expected functions without arguments, got {leaf!r}; use a lambda")
        self._final_ops = final_ops
        self.final_ops_values: Any = None
        """The results of the functions, in the structure of ``final_ops``; None before the end."""

    def end(self, session: TrainingSession) -> None:
        """Call the functions in order. Raises any exception of theirs."""
        self.final_ops_values = map_leaves(lambda final_op: final_op(), self._final_ops)


def is_positive(value: float) -> bool:
    """Return whether a value is a number above 0; True is no number here."""
    return not isinstance(value, bool) and value > 0


def _check_exactly_one(where: str, **options: float | None) -> None:
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        got = "both" if given else "none"
        raise ConfigError(f"{where}: expected exactly one of {' and '.join(options)}, got {got}")
    for name, value in given.items():
        if not is_positive(value):
            raise ConfigError(f"{where}: {name}: expected a positive number, got {value!r}")
