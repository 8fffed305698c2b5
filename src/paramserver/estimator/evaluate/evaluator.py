"""The evaluator's part of a run: evaluate each new checkpoint, export it, and finish with the run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paramserver.checkpoint.model_dir import exists, read_state
from paramserver.checkpoint.storage import join
from paramserver.cluster import Role, TaskId
from paramserver.cluster.report import Reporter
from paramserver.errors import CheckpointError, ConfigError
from paramserver.estimator.evaluate.results import EvalResult, scalars
from paramserver.estimator.export.exporters import Exporter, ExportingEstimator
from paramserver.estimator.hooks.hook import TrainingHook
from paramserver.estimator.specs import EvalSpec
from paramserver.transport.waiting import WaitLog

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.5
MISSING_GRACE = 10.0
MISSING_WARNING_INTERVAL = 600.0

Wait = Callable[[float], object]


class EvaluatingEstimator(ExportingEstimator, Protocol):
    """The part of an estimator that an evaluator uses."""

    @property
    def model_dir(self) -> str:
        """The folder of the checkpoints."""

    def latest_checkpoint(self) -> str | None:
        """Return the path of the newest checkpoint; None if there is none."""

    def evaluate(
        self,
        input_fn: Callable[..., object],
        steps: int | None,
        hooks: Sequence[TrainingHook],
        checkpoint_path: str,
        name: str | None,
    ) -> dict[str, Any]:
        """Return the metrics of a checkpoint."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluated checkpoint: its path, its metrics, each exporter's result, and whether it was the last."""

    checkpoint: str
    metrics: dict[str, Any]
    exports: tuple[str | None, ...]
    is_final: bool


class Evaluator:
    """Evaluates checkpoints by an EvalSpec, each once.

    Args:
        estimator: The estimator, which evaluates and exports.
        spec: The input and the exporters.
        max_steps: The step whose evaluation is the last; None if there is none.
        reporter: Reports to the launcher.
    """

    def __init__(
        self, estimator: EvaluatingEstimator, spec: EvalSpec, max_steps: int | None, reporter: Reporter
    ) -> None:
        self._estimator = estimator
        self._spec = spec
        self._max_steps = max_steps
        self._reporter = reporter
        self.last: Evaluation | None = None

    @property
    def is_done(self) -> bool:
        """Whether the last evaluated checkpoint has reached ``max_steps``."""
        return self.last is not None and self._is_final(self.last.metrics)

    def evaluate(self, checkpoint: str, *, is_last: bool = False) -> Evaluation:
        """Evaluate and export one checkpoint. With ``is_last`` it is the final one, whatever its step."""
        self._reporter.tell(state=f"evaluating {Path(checkpoint).name}")
        metrics = self._estimator.evaluate(
            self._spec.input_fn,
            steps=self._spec.steps,
            hooks=self._spec.hooks,
            checkpoint_path=checkpoint,
            name=self._spec.name,
        )
        _check_metrics(metrics)
        self._reporter.tell(state="waiting for a checkpoint", evaluation=scalars(metrics))
        return self._exported(checkpoint, metrics, is_last or self._is_final(metrics))

    def conclude(self) -> None:
        """Export the last checkpoint as the final one, unless that is done: no newer checkpoint will come."""
        if self.last is not None and not self.last.is_final:
            self._exported(self.last.checkpoint, self.last.metrics, is_final=True)

    def follow(self, run_id: str, *, wait: Wait, clock: Callable[[], float] = time.time) -> None:
        """Evaluate each new checkpoint until the run has ended. Blocks.

        If a hook or the end of the input ends the run early, the model_dir says so, and the last checkpoint is
        evaluated at once, without waiting for ``throttle_secs``.

        Args:
            run_id: The id of the run; "" if it has none.
            wait: Waits for a number of seconds.
            clock: Returns seconds since 1970.
        """
        began = clock()
        self._reporter.tell(state="waiting for a checkpoint")
        not_before = began + self._spec.start_delay_secs
        warn_at = not_before + MISSING_GRACE
        log = WaitLog(str(TaskId(Role.EVALUATOR, 0)))
        while not self.is_done:
            over = self._is_over(run_id, began)
            if not over and clock() < not_before:
                wait(min(POLL_INTERVAL, not_before - clock()))
                continue
            checkpoint = self._estimator.latest_checkpoint()
            is_new = checkpoint is not None and (self.last is None or checkpoint != self.last.checkpoint)
            if checkpoint is not None and is_new:
                not_before = clock() + self._spec.throttle_secs
                self._evaluate_if_there(checkpoint, is_last=over)
                log = WaitLog(str(TaskId(Role.EVALUATOR, 0)))
            elif over:
                self.conclude()
                return
            else:
                if checkpoint is None and clock() >= warn_at:
                    warn_at = clock() + MISSING_WARNING_INTERVAL
                    logger.warning("evaluator: there is no checkpoint in %s yet", self._estimator.model_dir)
                log.say("the chief", f"there is no new checkpoint in {self._estimator.model_dir}")
                wait(POLL_INTERVAL)

    def _evaluate_if_there(self, checkpoint: str, *, is_last: bool) -> None:
        """Evaluate a checkpoint that the chief may delete at any moment, after it has written newer ones."""
        try:
            self.evaluate(checkpoint, is_last=is_last)
        except CheckpointError:
            if exists(checkpoint):
                raise
            logger.info("evaluator: %s was deleted before it was read; going on with a newer one", checkpoint)

    def _is_over(self, run_id: str, began: float) -> bool:
        """Return whether the present run, and not an earlier one in this model_dir, is marked as ended."""
        state = read_state(self._estimator.model_dir)
        if state is None or not state.finished:
            return False
        return state.run_id == run_id if run_id else (state.finished_at or 0.0) >= began

    def _is_final(self, metrics: EvalResult) -> bool:
        return self._max_steps is not None and bool(metrics["global_step"] >= self._max_steps)

    def _exported(self, checkpoint: str, metrics: dict[str, Any], is_final: bool) -> Evaluation:
        exports = tuple(self._export(exporter, checkpoint, metrics, is_final) for exporter in self._spec.exporters)
        for path in filter(None, exports):
            self._reporter.tell(paths={"export": path})
        self.last = Evaluation(checkpoint, metrics, exports, is_final)
        return self.last

    def _export(self, exporter: Exporter, checkpoint: str, metrics: dict[str, Any], is_final: bool) -> str | None:
        path = join(self._estimator.model_dir, "export", exporter.name)
        exported = exporter.export(self._estimator, path, checkpoint, dict(metrics), is_the_final_export=is_final)
        if exported:
            logger.info("exported %s to %s", checkpoint, exported)
        return exported


def wait_for(seconds: float) -> None:
    """Wait for a number of seconds: the file system that checkpoints come from sends no notice of them."""
    threading.Event().wait(seconds)


def _check_metrics(metrics: object) -> None:
    if not isinstance(metrics, dict):
        raise TypeError(f"evaluate must return a dict of metrics, got a {type(metrics).__name__}")
    if not metrics:
        raise ConfigError("evaluate returned no metrics; expected at least loss and global_step")
    if "global_step" not in metrics:
        raise ConfigError(f"evaluate returned no 'global_step', only {', '.join(metrics)}")
