"""The hook that evaluates a model while it is trained in the same process, without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paramserver.errors import ConfigError
from paramserver.estimator.arguments import check_steps
from paramserver.estimator.estimator import Estimator
from paramserver.estimator.hooks.basic import SecondOrStepTimer
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession, as_tuple


class InMemoryEvaluatorHook(TrainingHook):
    """Evaluates before the first step, every ``every_n_iter`` steps, and after the last one.

    It evaluates the values that the model has at that moment, and logs and writes the results like
    `Estimator.evaluate`. Training waits meanwhile.

    Args:
        estimator: The estimator that trains, in one process.
        input_fn: Returns the batches to evaluate on; called for each evaluation.
        steps: Number of batches of an evaluation; None evaluates until the input ends.
        hooks: Called around every batch of an evaluation.
        name: Distinguishes evaluations on different data.
        every_n_iter: Steps between two evaluations.

    Raises:
        TypeError: If the estimator is not an Estimator, input_fn is not a function, or a hook is not a TrainingHook.
        ConfigError: In a cluster, where an evaluator task follows the checkpoints; or if a number is not positive.
    """

    def __init__(
        self,
        estimator: Estimator,
        input_fn: Callable[..., object],
        steps: int | None = None,
        hooks: Sequence[TrainingHook] | None = None,
        name: str | None = None,
        every_n_iter: int = 100,
    ) -> None:
        if not isinstance(estimator, Estimator):
            raise TypeError(f"InMemoryEvaluatorHook: estimator: expected an Estimator, got {estimator!r}")
        if not callable(input_fn):
            raise TypeError(f"InMemoryEvaluatorHook: input_fn: expected a function, got {input_fn!r}")
        if every_n_iter is None:
            raise ConfigError("InMemoryEvaluatorHook: every_n_iter: expected a positive number, got None")
        check_steps("InMemoryEvaluatorHook", every_n_iter=every_n_iter)
        check_steps("InMemoryEvaluatorHook", steps=steps)
        if estimator.config.cluster_spec:
            raise ConfigError(
                f"InMemoryEvaluatorHook: {estimator.config.task} is a task of a cluster, and the hook is for training "
                "in one process; add an evaluator to the cluster, which follows the checkpoints"
            )
        self._estimator, self._input_fn, self._steps, self._name = estimator, input_fn, steps, name
        self._hooks = as_tuple(hooks, TrainingHook, "InMemoryEvaluatorHook: hooks")
        self._every = every_n_iter
        self.begin()

    def begin(self) -> None:
        """Start to count the steps of a training."""
        self._timer = SecondOrStepTimer(every_steps=self._every)
        self._iteration = 0

    def after_create_session(self, session: TrainingSession) -> None:
        """Evaluate the values that training starts from."""
        self._evaluate(session)

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Evaluate when due."""
        self._iteration += 1
        if self._timer.should_trigger_for_step(self._iteration):
            self._evaluate(context.session)

    def end(self, session: TrainingSession) -> None:
        """Evaluate the final model, unless that was just done."""
        if self._timer.last_triggered_step != self._iteration:
            self._evaluate(session)

    def _evaluate(self, session: TrainingSession) -> None:
        self._timer.update_last_triggered_step(self._iteration)
        self._estimator.evaluate_values(
            session.values(), session.global_step, self._input_fn, self._steps, self._hooks, self._name
        )
