"""The training of one task: its hooks, its input, its session."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from paramserver.checkpoint.storage import absolute
from paramserver.cluster import environment
from paramserver.cluster.exit_codes import may_come_back
from paramserver.cluster.report import Reporter
from paramserver.cluster.task import ALONE
from paramserver.cluster.termination import Termination
from paramserver.distribute.parameter_server import ParameterServerStrategy
from paramserver.errors import ConfigError, RunOverError
from paramserver.estimator.calling import Batch
from paramserver.estimator.hooks.basic import StopAtStepHook
from paramserver.estimator.hooks.hook import (
    HookRunner,
    RunContext,
    RunValues,
    TrainingHook,
    TrainingSession,
    order_hooks,
)
from paramserver.estimator.hooks.saving import CheckpointSaverHook, CheckpointSaverListener, SummarySaverHook
from paramserver.estimator.hooks.watching import LoggingHook, NanLossHook, StepCounterHook
from paramserver.estimator.run_config import RunConfig
from paramserver.estimator.specs import EstimatorSpec
from paramserver.estimator.train.loop import TrainingLoop
from paramserver.estimator.train.session import TrainingRun
from paramserver.estimator.uploading import training_writer
from paramserver.summary import SummaryWriter

REPORT_INTERVAL = 0.2


def train(
    strategy: ParameterServerStrategy,
    config: RunConfig,
    build: Callable[[], EstimatorSpec],
    read: Callable[[], Iterator[Batch]],
    *,
    hooks: Sequence[TrainingHook] = (),
    saving_listeners: Sequence[CheckpointSaverListener] = (),
    steps: int | None = None,
    max_steps: int | None = None,
) -> int:
    """Train on this task to ``max_steps``, ``steps`` more, the end of the input, or a hook's request. Blocks.

    Args:
        strategy: The strategy of the training.
        config: The configuration of the run; its model_dir is set.
        build: Makes the model and optimizer, inside the strategy's scope.
        read: Opens the input.
        hooks: The user's hooks for every worker.
        saving_listeners: Called for every checkpoint, on the chief.
        steps: Number of global steps to make, counted from the session's start.
        max_steps: The global step to stop at.

    Returns:
        The number of steps that this task made.

    Raises:
        Exception: Any exception of the user's functions, the hooks or the session; the ps tasks are told of it first.
    """
    reporter = Reporter(str(strategy.task or ALONE), environment.read().report_fd)
    reporter.tell(state="building the model", max_steps=max_steps)
    if config.seed is not None:
        torch.manual_seed(config.seed)
    counter = _LocalSteps()
    with strategy.scope(), _terminating(), _telling_failure(strategy):
        spec = build()
        with training_writer(config.model_dir or "") as writer:
            user = (*hooks, *spec.training_hooks)
            runner = HookRunner(
                order_hooks(
                    is_chief=strategy.is_chief,
                    chief_only=(*_savers(config, user, saving_listeners), *_chief_hooks(config, spec, writer)),
                    user=(*_stopping(steps, max_steps), *_without_savers(user), counter),
                    last=(NanLossHook(), *_logging(config), *_reporting(reporter, config)),
                )
            )
            runner.begin()
            TrainingLoop(TrainingRun(strategy, spec, config, max_steps, reporter), runner).run(read)
    reporter.tell(state="done", global_step=strategy.global_step, step_seconds=strategy.statistics().per_step())
    return counter.steps


def _terminating() -> contextlib.AbstractContextManager[object]:
    """Return a context in which SIGTERM is an exception, unless the program handles it or cannot."""
    is_handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    is_main = threading.current_thread() is threading.main_thread()
    return contextlib.nullcontext() if is_handled or not is_main else Termination()


@contextlib.contextmanager
def _telling_failure(strategy: ParameterServerStrategy) -> Iterator[None]:
    try:
        yield
    except RunOverError:
        strategy.close()  # this task came too late to be of use, but it has not failed
        raise
    except BaseException as error:
        in_cluster = strategy.task is not None  # otherwise there is no other task to tell
        if may_come_back(error):
            strategy.leave()
        else:
            strategy.close(failure=f"{type(error).__name__}: {error}" if in_cluster else "")
        raise


def _stopping(steps: int | None, max_steps: int | None) -> list[TrainingHook]:
    return [StopAtStepHook(num_steps=steps, last_step=max_steps)] if steps or max_steps else []


def _without_savers(user: Sequence[TrainingHook]) -> list[TrainingHook]:
    return [hook for hook in user if not isinstance(hook, CheckpointSaverHook)]


def _savers(
    config: RunConfig, user: Sequence[TrainingHook], listeners: Sequence[CheckpointSaverListener]
) -> list[TrainingHook]:
    """Return the hooks that save checkpoints: the user's own, or else one from the configuration."""
    theirs = [hook for hook in user if isinstance(hook, CheckpointSaverHook)]
    if theirs:
        return [theirs[0].with_listeners(listeners), *theirs[1:]]
    if config.saves_checkpoints:
        secs, steps = config.save_checkpoints_secs, config.save_checkpoints_steps
        return [CheckpointSaverHook(save_secs=secs, save_steps=steps, listeners=listeners)]
    if listeners:
        raise ConfigError(
            "saving_listeners are given, and no checkpoints are saved; "
            "set save_checkpoints_steps or save_checkpoints_secs of RunConfig"
        )
    return []


def _chief_hooks(config: RunConfig, spec: EstimatorSpec, writer: SummaryWriter) -> list[TrainingHook]:
    hooks: list[TrainingHook] = []
    if config.save_summary_steps:
        hooks.append(SummarySaverHook(writer, save_steps=config.save_summary_steps))
    if config.log_step_count_steps:
        hooks.append(StepCounterHook(config.log_step_count_steps))
    return [*hooks, *spec.training_chief_hooks]


def _logging(config: RunConfig) -> list[TrainingHook]:
    return [LoggingHook(config.log_step_count_steps, at_end=True)] if config.log_step_count_steps else []


def _reporting(reporter: Reporter, config: RunConfig) -> list[TrainingHook]:
    return [_ReportHook(reporter, config)] if reporter.is_on else []


class _LocalSteps(TrainingHook):
    """Counts the steps of this task."""

    def __init__(self) -> None:
        self.steps = 0

    def after_run(self, context: RunContext, values: RunValues) -> None:
        self.steps += 1


class _ReportHook(TrainingHook):
    """Reports the progress of the training to the launcher a few times a second, and the result of its last step."""

    def __init__(self, reporter: Reporter, config: RunConfig) -> None:
        self._reporter = reporter
        self._summaries = absolute(config.model_dir or "")
        self._last = time.monotonic()
        self._untold: RunValues | None = None

    def after_create_session(self, session: TrainingSession) -> None:
        self._last = time.monotonic()
        paths = {"summaries": self._summaries} if session.is_chief else None
        self._reporter.tell(state="training", global_step=session.global_step, paths=paths)

    def after_run(self, context: RunContext, values: RunValues) -> None:
        self._untold = values
        now = time.monotonic()
        if now - self._last >= REPORT_INTERVAL:
            self._last = now
            self._tell(values)

    def end(self, session: TrainingSession) -> None:
        if self._untold is not None:
            self._tell(self._untold)

    def _tell(self, values: RunValues) -> None:
        self._reporter.tell(state="training", global_step=values.global_step, loss=float(values.loss))
        self._untold = None
