"""A training session: a prepared model, the ps tasks that hold it, and the checkpoints that it starts from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from paramserver.checkpoint.model_dir import CheckpointManager, checkpoint_step, checkpoint_to_restore
from paramserver.client.client import ParameterClient
from paramserver.cluster import environment
from paramserver.cluster.report import Reporter
from paramserver.cluster.task import ALONE
from paramserver.distribute.bound.model import BoundModel
from paramserver.distribute.bound.plan import aliases, plain_name
from paramserver.distribute.bound.step_times import StepTimes
from paramserver.distribute.checkpoints import lost_updates, restore_checkpoint, write_checkpoint
from paramserver.distribute.parameter_server import ParameterServerStrategy
from paramserver.distribute.reduce.reduction import ReduceOp
from paramserver.errors import ConfigError, UnavailableError
from paramserver.estimator.calling import Batch, as_loss
from paramserver.estimator.hooks.hook import RunValues
from paramserver.estimator.run_config import RunConfig
from paramserver.estimator.specs import EstimatorSpec
from paramserver.estimator.train.schedule import Schedule

logger = logging.getLogger(__name__)

LOSSES_IN_A_ROW = 10
"""Number of losses of a ps without a step between them after which the training gives up."""


class TrainingRun:
    """One training of one task, from connecting to the goodbye; the ``session`` of hooks.

    Args:
        strategy: The strategy, which prepares the model.
        spec: The result of the model_fn for TRAIN.
        config: The configuration of the run; its model_dir is set.
        max_steps: The global step to stop at; None trains until the input ends.
        reporter: Reports the state of this task to the launcher.
    """

    def __init__(
        self,
        strategy: ParameterServerStrategy,
        spec: EstimatorSpec,
        config: RunConfig,
        max_steps: int | None,
        reporter: Reporter,
    ) -> None:
        assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
        assert spec.optimizers  # noqa: S101
        assert config.model_dir is not None  # noqa: S101  # the Estimator has set it
        self.is_chief = strategy.is_chief
        self.task = str(strategy.task or ALONE)
        self.model_dir = config.model_dir
        self._strategy = strategy
        self._spec = spec
        self._max_steps = max_steps
        self._reporter = reporter
        self._patience = config.session_creation_timeout_secs
        self._losses = 0
        self._schedules = [Schedule(scheduler, max_steps) for scheduler in spec.schedulers]
        self._aliases = aliases(spec.model)
        self._manager = CheckpointManager(
            config.model_dir, config.keep_checkpoint_max, config.keep_checkpoint_every_n_hours
        )
        self._run_id = environment.read().run_id
        if self.is_chief:
            self._manager.remove_leftovers()
            self._manager.mark_started(self._run_id)
        self.model = spec.model
        self.optimizers = strategy.prepare_from(
            spec.model,
            spec.optimizers,
            initialize=self._initialize,
            buffers=spec.buffers,
            timeout=self._patience,
            on_wait=self._waits_for_chief,
        )
        self.model.train()
        for schedule in self._schedules:
            schedule.resume(self.global_step)

    @property
    def global_step(self) -> int:
        """Updates of the model that this task knows of. Does not block."""
        return self._strategy.global_step

    def read_global_step(self) -> int:
        """Request the present number of updates of the model. Blocks for a round trip.

        Raises:
            UnavailableError: If ps:0 is lost.
        """
        return self._client.read_global_step()

    def refresh(self) -> int:
        """Read the model's values from the ps tasks; return the global step. Blocks.

        Raises:
            UnavailableError: If a ps is lost.
        """
        return self._strategy.refresh()

    def values(self) -> dict[str, torch.Tensor]:
        """Return the values of the model by name, as in checkpoints. Blocks if the model has tables.

        Raises:
            UnavailableError: If a ps is lost.
        """
        return {plain_name(name): value for name, value in self.model.state_dict().items()}

    def statistics(self) -> StepTimes:
        """Return where the time of this task's steps has gone. Does not block."""
        return self._strategy.statistics()

    def should_stop(self) -> bool:
        """Return whether the step to stop at is reached."""
        return self._max_steps is not None and self.global_step >= self._max_steps

    def step(self, batches: Iterator[Batch]) -> RunValues:
        """Make one step on the next batch of each replica. The loss of the result is the mean over the replicas.

        If the loss is NaN, nothing is pushed, so that the model of other workers stays intact.

        Raises:
            StopIteration: If the input has ended.
            UnavailableError: If a ps is lost.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses = self._strategy.run(self._loss, args=next(batches))
        loss = self._strategy.reduce(ReduceOp.MEAN, losses).detach()
        if math.isnan(loss.item()):
            return RunValues(loss, self.global_step, 0)
        self._strategy.run(self._update, args=(losses,))
        push = self.optimizers[0].last_push
        assert push is not None  # noqa: S101  # a step was just made
        self._losses = 0
        for schedule in self._schedules:
            schedule.follow(push.global_step)
        return RunValues(loss, push.global_step, push.staleness)

    def save(self) -> str:
        """Write a checkpoint of the present global step, unless there is one; return its path. Blocks.

        Raises:
            CheckpointError: If the checkpoint cannot be written.
            ConfigError: On a worker that is not the chief.
        """
        if not self.is_chief:
            raise ConfigError(f"save: {self.task} cannot write a checkpoint, only the chief can")
        step = self._client.read_global_step()
        if self._manager.is_saved(step):
            return self._manager.save_path(step)
        self._reporter.tell(state="saving", global_step=step)
        try:
            path = write_checkpoint(self._client, self._manager, step, self._aliases)
        finally:
            self._reporter.tell(state="training")
        self._reporter.tell(state="training", paths={"checkpoint": path})
        return path

    def recover(self, error: UnavailableError) -> None:
        """Wait until a lost ps is back, and continue with the values of the ps tasks. Blocks.

        If a ps has lost its variables, the chief restores the latest checkpoint; without one, its own values.

        Raises:
            UnavailableError: The given error, without a cluster; the last one after `LOSSES_IN_A_ROW` losses.
            DeadlineError: If a ps or the chief does not come back in time.
        """
        reached = self.global_step
        while True:
            self._losses += 1
            if self._strategy.task is None or self._losses > LOSSES_IN_A_ROW:
                raise error
            # As text: a kept log record must not keep alive the tensors in the frames of the error's traceback.
            logger.warning("%s goes on when its ps tasks are back: %s", self.task, str(error))
            self._reporter.tell(state=f"waiting for {error.task}")
            try:
                self._strategy.recover(
                    initialize=self._initialize,
                    timeout=self._patience,
                    on_wait=self._waits_for_chief,
                )
            except UnavailableError as again:
                error = again
            else:
                break
        if self.is_chief and self.global_step < reached:  # another task is warned by `Strategy.recover`
            logger.warning("%s: %s", self.task, lost_updates(reached, self.global_step))

    def finish(self, while_waiting: Callable[[], object] = lambda: None) -> None:
        """End the loop with a fresh global step. Blocks for as long as other workers take.

        The chief waits until all other workers have finished, so that its last checkpoint contains their updates.

        Args:
            while_waiting: Called about once a second during this wait, with a fresh global step.

        Raises:
            UnavailableError: If a ps is lost.
        """

        def on_wait(tasks: tuple[str, ...]) -> None:
            step = self._client.read_global_step()
            self._reporter.tell(state=f"waiting for {', '.join(tasks)}", global_step=step)
            while_waiting()

        if self.is_chief:
            self._client.await_workers(on_wait)
        self._client.read_global_step()

    def close(self) -> None:
        """Record in model_dir, and tell the ps tasks, that the training has ended cleanly."""
        if self.is_chief:
            self._manager.mark_finished(self._run_id)
        self._strategy.close()

    def __repr__(self) -> str:
        return f"<TrainingRun of {self.task} at global step {self.global_step} in {self.model_dir}>"

    @property
    def _client(self) -> ParameterClient:
        assert self._strategy.client is not None  # noqa: S101  # prepared in the constructor
        return self._strategy.client

    def _initialize(self, client: ParameterClient, bound: BoundModel) -> int:
        checkpoint = checkpoint_to_restore(self.model_dir)
        if checkpoint is None:
            bound.assign()
            return client.global_step
        logger.info("%s restores %s", self.task, checkpoint)
        restore_checkpoint(client, checkpoint)
        return checkpoint_step(checkpoint)

    def _loss(self, features: Any, labels: Any) -> torch.Tensor:
        assert self._spec.loss_fn is not None  # noqa: S101  # EstimatorSpec has checked it
        return as_loss(self._spec.loss_fn(self.model, features, labels))

    def _update(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        for optimizer in self.optimizers:
            optimizer.step()

    def _waits_for_chief(self, seconds: float) -> None:
        self._reporter.tell(state="waiting for the chief")
