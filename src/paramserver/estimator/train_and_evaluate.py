"""train_and_evaluate: one program for every role, and for one process."""

from __future__ import annotations

import logging
import time
from typing import Any

from paramserver.cluster import Role, environment
from paramserver.cluster.report import Reporter
from paramserver.cluster.spec import expected_one_of
from paramserver.cluster.task import ALONE
from paramserver.distribute.parameter_server import ParameterServerStrategy
from paramserver.errors import CheckpointError, ConfigError, RunOverError
from paramserver.estimator.arguments import training_strategy
from paramserver.estimator.estimator import Estimator
from paramserver.estimator.evaluate.evaluator import Evaluator, wait_for
from paramserver.estimator.hooks.hook import TrainingSession
from paramserver.estimator.hooks.saving import CheckpointSaverListener
from paramserver.estimator.run_config import RunConfig
from paramserver.estimator.specs import EvalSpec, TrainSpec
from paramserver.server.server import run_standard_server

logger = logging.getLogger(__name__)

Results = tuple[dict[str, Any], list[str | None]]


def train_and_evaluate(estimator: Estimator, train_spec: TrainSpec, eval_spec: EvalSpec) -> Results | None:
    """Play this task's part of a run: train, serve or evaluate, until the run has ended. Blocks.

    TF_CONFIG names the part. The chief and the workers train to ``train_spec.max_steps``, ps tasks serve, and the
    evaluator evaluates each new checkpoint. Without a cluster everything happens in this process: training, evaluations
    of checkpoints that are at least ``eval_spec.throttle_secs`` apart, and an evaluation at the end.

    Returns:
        In one process the metrics of the last evaluation and the results of its exporters; None in a cluster.

    Raises:
        TypeError: If an argument has the wrong type.
        ConfigError: If TF_CONFIG or the specs are invalid.
        UnavailableError: If a ps is lost.
    """
    _check_types(estimator, train_spec, eval_spec)
    config = estimator.config
    if config.task_type is Role.EVALUATOR:
        _run_evaluator(estimator, train_spec, eval_spec)
        return None
    if not config.cluster_spec:
        return _run_local(estimator, train_spec, eval_spec)
    if config.task_type is Role.PS:
        run_standard_server()
    elif config.task_type in (Role.CHIEF, Role.WORKER):
        _run_worker(estimator, train_spec)
    else:
        raise ConfigError(f"train_and_evaluate on {config.task}: {expected_one_of(Role, config.task_type)}")
    return None


def _run_worker(estimator: Estimator, spec: TrainSpec) -> None:
    config = estimator.config
    strategy = _strategy(config)
    if config.start_delay_secs:
        logger.info("%s starts in %g s", config.task, config.start_delay_secs)
        wait_for(config.start_delay_secs)
    try:
        estimator.train_on(
            strategy,
            spec.input_fn,
            hooks=spec.hooks,
            max_steps=spec.max_steps,
            saving_listeners=spec.saving_listeners,
        )
    except RunOverError as over:
        logger.info("%s", over)
    Reporter(str(config.task), environment.read().report_fd).tell(state="done")


def _strategy(config: RunConfig) -> ParameterServerStrategy:
    """Return the strategy of a task of a cluster; one in this process if no other task trains or serves."""
    is_alone = not config.num_ps_replicas and config.num_worker_replicas == 1
    if is_alone:
        logger.info("%s is alone in its cluster: the variables stay in its process", config.task)
        return training_strategy(config.train_distribute)
    strategy = config.train_distribute or ParameterServerStrategy()
    if not isinstance(strategy, ParameterServerStrategy) or strategy.task is None:
        raise ConfigError(
            f"train_and_evaluate on {config.task}: expected a ParameterServerStrategy that was made with this "
            f"cluster, got {strategy!r}"
        )
    return strategy


def _run_evaluator(estimator: Estimator, train_spec: TrainSpec, eval_spec: EvalSpec) -> None:
    config = estimator.config
    if config.task_id > 0:
        raise ConfigError(f"there can only be one evaluator task, and this one is {config.task}")
    surroundings = environment.read()
    reporter = Reporter(str(config.task), surroundings.report_fd)
    Evaluator(estimator, eval_spec, train_spec.max_steps, reporter).follow(surroundings.run_id, wait=wait_for)
    reporter.tell(state="done")


def _run_local(estimator: Estimator, train_spec: TrainSpec, eval_spec: EvalSpec) -> Results:
    reporter = Reporter(str(ALONE), environment.read().report_fd)
    evaluator = Evaluator(estimator, eval_spec, train_spec.max_steps, reporter)
    listener = _EvaluationListener(evaluator, estimator, eval_spec.throttle_secs)
    estimator.train(
        train_spec.input_fn,
        hooks=train_spec.hooks,
        max_steps=train_spec.max_steps,
        saving_listeners=(*train_spec.saving_listeners, listener),
    )
    checkpoint = estimator.latest_checkpoint()
    if checkpoint is None:
        raise CheckpointError(
            f"There was no new checkpoint after the training in {estimator.model_dir}, so there is nothing to "
            "evaluate; does RunConfig switch checkpoints off?",
            estimator.model_dir,
        )
    if evaluator.last is None or evaluator.last.checkpoint != checkpoint:
        evaluator.evaluate(checkpoint, is_last=True)
    evaluator.conclude()
    assert evaluator.last is not None  # noqa: S101  # the lines above have evaluated
    return evaluator.last.metrics, list(evaluator.last.exports)


class _EvaluationListener(CheckpointSaverListener):
    """Evaluates checkpoints when they are saved: not the first, which is untrained, and not too often."""

    def __init__(self, evaluator: Evaluator, estimator: Estimator, throttle: float) -> None:
        self._evaluator = evaluator
        self._estimator = estimator
        self._throttle = throttle
        self._is_first = True
        self._not_before = time.monotonic() + throttle

    def after_save(self, session: TrainingSession, step: int) -> bool:
        if self._is_first:
            self._is_first = False
        elif time.monotonic() >= self._not_before:
            self._not_before = time.monotonic() + self._throttle
            self._evaluate()
        else:
            logger.info("the checkpoint of step %d is not evaluated: the last one is less than throttle_secs ago", step)
        return self._evaluator.is_done

    def _evaluate(self) -> None:
        checkpoint = self._estimator.latest_checkpoint()
        if checkpoint is not None:
            self._evaluator.evaluate(checkpoint)


def _check_types(estimator: Any, train_spec: Any, eval_spec: Any) -> None:
    expected = {
        "eval_spec": (eval_spec, EvalSpec),
        "estimator": (estimator, Estimator),
        "train_spec": (train_spec, TrainSpec),
    }
    for name, (value, kind) in expected.items():
        if not isinstance(value, kind):
            raise TypeError(f"train_and_evaluate: {name}: expected {kind.__name__}, got a {type(value).__name__}")
