"""Hooks that end a training before its last step, based on the results of evaluations.

Rules
    * The chief asks a predicate: at its first step, then at most once in a number of seconds or global steps.
    * The other workers learn the decision from one number on a ps, STOP, which they read after each of their steps. A
      number above 0 stops a worker. In one process there is no other worker to tell.
    * STOP is created after the model has its values, so that the STOP in a checkpoint of an earlier run never counts: a
      training that was stopped can be continued.
    * The evaluator learns of the end from model_dir, as it learns of any other end.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from paramserver.checkpoint.storage import join
from paramserver.distribute.variables.variable import Variable, VariableAggregation
from paramserver.errors import ConfigError, did_you_mean
from paramserver.estimator.estimator import Estimator
from paramserver.estimator.event_files import read_eval_metrics
from paramserver.estimator.hooks.basic import SecondOrStepTimer
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession

STOP = "early_stopping/stop"
"""The name of the variable that tells workers to stop."""

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Compare = Callable[[float, float], bool]


def make_early_stopping_hook(
    estimator: Estimator,
    should_stop_fn: Callable[[], bool],
    run_every_secs: float | None = 60,
    run_every_steps: int | None = None,
) -> TrainingHook:
    """Return a hook that ends the training of all workers when a function returns True.

    It belongs into ``TrainSpec.hooks`` of every task, or into the hooks of `Estimator.train`. Works in one process and
    in a cluster, with any strategy. In a cluster, each worker except the chief makes one additional small request to a
    ps in each step.

    Args:
        estimator: The estimator that trains.
        should_stop_fn: Called without arguments, on the chief only, between two steps; training waits for it.
        run_every_secs: Seconds between two calls; exactly one of the two is set.
        run_every_steps: Global steps between two calls; ``run_every_secs`` must then be None.

    Raises:
        TypeError: If the estimator is not an Estimator, or should_stop_fn is not a function.
        ConfigError: If not exactly one interval is set, or it is not positive.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"make_early_stopping_hook: estimator: expected an Estimator, got {estimator!r}")
    if not callable(should_stop_fn):
        raise TypeError(f"make_early_stopping_hook: should_stop_fn: expected a function, got {should_stop_fn!r}")
    if (run_every_secs is None) == (run_every_steps is None):
        raise ConfigError(
            "make_early_stopping_hook: expected exactly one of run_every_secs and run_every_steps, got "
            f"{run_every_secs} and {run_every_steps}; run_every_secs is 60 unless it is None"
        )
    timer = SecondOrStepTimer(every_secs=run_every_secs, every_steps=run_every_steps)
    in_cluster = bool(estimator.config.cluster_spec)
    if in_cluster and not estimator.config.is_chief:
        return _ObeyingHook()
    return _AskingHook(should_stop_fn, timer, in_cluster)


def stop_if_higher_hook(
    estimator: Estimator,
    metric_name: str,
    threshold: float,
    eval_dir: PathLike | None = None,
    min_steps: int = 0,
    run_every_secs: float | None = 60,
    run_every_steps: int | None = None,
) -> TrainingHook:
    """Return a hook that ends the training once a metric was higher than a threshold in any evaluation.

    Args:
        estimator: The estimator that trains.
        metric_name: The name of the metric, such as ``"accuracy"``.
        threshold: The threshold; a value equal to it does not count.
        eval_dir: The folder of the evaluations, a path or URL; by default ``model_dir/eval``. For an EvalSpec with a
            name it is ``model_dir/eval_NAME``.
        min_steps: The first global step whose evaluation counts.
        run_every_secs: As for `make_early_stopping_hook`.
        run_every_steps: As for `make_early_stopping_hook`.

    Raises:
        TypeError: As `make_early_stopping_hook`.
        ConfigError: As `make_early_stopping_hook`; and from the training, if evaluations lack the metric.
    """
    evaluations = _Evaluations(estimator, metric_name, eval_dir, min_steps)
    return evaluations.hook(partial(_crosses, operator.gt, threshold), run_every_secs, run_every_steps)


def stop_if_lower_hook(
    estimator: Estimator,
    metric_name: str,
    threshold: float,
    eval_dir: PathLike | None = None,
    min_steps: int = 0,
    run_every_secs: float | None = 60,
    run_every_steps: int | None = None,
) -> TrainingHook:
    """Return a hook that ends the training once a metric was lower than a threshold: as `stop_if_higher_hook`."""
    evaluations = _Evaluations(estimator, metric_name, eval_dir, min_steps)
    return evaluations.hook(partial(_crosses, operator.lt, threshold), run_every_secs, run_every_steps)


def stop_if_no_increase_hook(
    estimator: Estimator,
    metric_name: str,
    max_steps_without_increase: int,
    eval_dir: PathLike | None = None,
    min_steps: int = 0,
    run_every_secs: float | None = 60,
    run_every_steps: int | None = None,
) -> TrainingHook:
    """Return a hook that ends the training when a metric has not increased for a number of global steps.

    ``max_steps_without_increase`` counts from the evaluation with the highest value to a later evaluation, at which the
    training ends. The other arguments and the errors are those of `stop_if_higher_hook`.
    """
    evaluations = _Evaluations(estimator, metric_name, eval_dir, min_steps)
    return evaluations.hook(partial(_stalls, operator.gt, max_steps_without_increase), run_every_secs, run_every_steps)


def stop_if_no_decrease_hook(
    estimator: Estimator,
    metric_name: str,
    max_steps_without_decrease: int,
    eval_dir: PathLike | None = None,
    min_steps: int = 0,
    run_every_secs: float | None = 60,
    run_every_steps: int | None = None,
) -> TrainingHook:
    """Return a hook that ends the training when a metric has not decreased: as `stop_if_no_increase_hook`."""
    evaluations = _Evaluations(estimator, metric_name, eval_dir, min_steps)
    return evaluations.hook(partial(_stalls, operator.lt, max_steps_without_decrease), run_every_secs, run_every_steps)


# --- predicates --------------------------------------------------------------------------------------------------

_Values = Iterator[tuple[int, float]]
"""Global step and value of a metric, in the order of the steps."""


@dataclass(frozen=True)
class _Evaluations:
    """The evaluations whose values of one metric a hook watches."""

    estimator: Estimator
    metric_name: str
    eval_dir: PathLike | None
    min_steps: int

    def hook(
        self, rule: Callable[[_Values], str], run_every_secs: float | None, run_every_steps: int | None
    ) -> TrainingHook:
        """Return a hook that stops the training when a rule returns a reason for it."""

        def should_stop() -> bool:
            reason = rule(self._values())
            if reason:
                logger.info("%s %s", self.metric_name, reason)
            return bool(reason)

        return make_early_stopping_hook(self.estimator, should_stop, run_every_secs, run_every_steps)

    def _values(self) -> _Values:
        """Yield the values. The newest evaluation may lack the metric, since it may still be being written."""
        eval_dir, name = self.eval_dir or join(self.estimator.model_dir, "eval"), self.metric_name
        results = read_eval_metrics(eval_dir)
        for step, metrics in results.items():
            if step < self.min_steps:
                continue
            if name in metrics:
                yield step, metrics[name]
            elif step != max(results):
                raise ConfigError(
                    f"early stopping: the evaluation of step {step} in {eval_dir} has no metric {name!r}, only "
                    f"{', '.join(sorted(metrics))}{did_you_mean(name, metrics)}"
                )


def _crosses(is_beyond: Compare, threshold: float, values: _Values) -> str:
    for step, value in values:
        if is_beyond(value, threshold):
            return f"was {value:.6g} at step {step}, beyond the threshold {threshold:g}"
    return ""


def _stalls(is_better: Compare, max_steps: int, values: _Values) -> str:
    best: tuple[int, float] | None = None
    for step, value in values:
        if best is None or is_better(value, best[1]):
            best = step, value
        if step - best[0] >= max_steps:
            return f"was best at step {best[0]} with {best[1]:.6g}, and not better until step {step}"
    return ""


# --- hooks -------------------------------------------------------------------------------------------------------


class _StopHook(TrainingHook):
    """The common part of the hooks of all tasks of a cluster: the variable STOP, created once in each training."""

    def begin(self) -> None:
        self.stop: Variable | None = None

    def after_create_session(self, session: TrainingSession) -> None:
        """Create STOP; a session that was recreated has it already."""
        if self.stop is None:
            self.stop = Variable(0, name=STOP, trainable=False, aggregation=VariableAggregation.SUM)


class _AskingHook(_StopHook):
    """The hook of the chief: asks the predicate, and tells the other workers."""

    def __init__(self, should_stop: Callable[[], bool], timer: SecondOrStepTimer, has_others: bool) -> None:
        self._should_stop, self._timer = should_stop, timer
        self._has_others = has_others

    def begin(self) -> None:
        super().begin()
        self._is_decided = False

    def after_create_session(self, session: TrainingSession) -> None:
        """Assign the present decision to STOP: after the loss of a ps, it may hold an outdated one."""
        if self._has_others:
            super().after_create_session(session)
            self._tell()

    def after_run(self, context: RunContext, values: RunValues) -> None:
        self._decide(values.global_step)
        if self._is_decided:
            context.request_stop()

    def while_waiting(self, context: RunContext) -> None:
        """Decide also while waiting: the other workers still train, and can be stopped."""
        self._decide(context.session.global_step)

    def _decide(self, step: int) -> None:
        """Ask the predicate if that is due, and tell the other workers once."""
        if self._is_decided or not self._timer.should_trigger_for_step(step):
            return
        self._timer.update_last_triggered_step(step)
        self._is_decided = self._should_stop()
        if self._is_decided:
            logger.info("training is stopped early, at global step %d", step)
            self._tell()

    def _tell(self) -> None:
        if self.stop is not None:
            self.stop.assign(int(self._is_decided))


class _ObeyingHook(_StopHook):
    """The hook of every other worker: stops when the chief has decided so."""

    def after_run(self, context: RunContext, values: RunValues) -> None:
        if self.stop is not None and int(self.stop.value()) > 0:
            logger.info("%s stops early, as the chief has decided", context.session.task)
            context.request_stop()
