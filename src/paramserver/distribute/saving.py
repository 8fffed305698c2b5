"""Saving, resuming and ending for a training loop of one's own; a part of `ParameterServerStrategy`.

Rules
    * The chief decides; the ps tasks write and read. Every worker may make every call.
    * No checkpoint overwrites newer values: a chief that was restarted goes on with the values of the ps tasks.
    * Workers see restored values at one point: in `prepare`, or in a `restore` that follows it before the first step.
      There they wait for the chief, unless the chief trains already.
"""

from __future__ import annotations

import logging
import os
import weakref

from paramserver.checkpoint import model_dir as model_dirs
from paramserver.checkpoint.model_dir import checkpoint_step
from paramserver.checkpoint.storage import absolute
from paramserver.client.client import ParameterClient
from paramserver.cluster import TaskId
from paramserver.cluster.task import ALONE
from paramserver.distribute import checkpoints
from paramserver.distribute.bound.model import BoundModel
from paramserver.distribute.checkpoints import Checkpoints, find_checkpoint, saved_names
from paramserver.distribute.strategy import Strategy

logger = logging.getLogger(__name__)


class SavingStrategy(Strategy):
    """A strategy whose variables can be saved and restored.

    Attributes:
        task: This task; None in one process.
        client: The client of the ps tasks; None before it has connected.
    """

    task: TaskId | None
    client: ParameterClient | None
    _models: weakref.WeakSet[BoundModel]

    def _begin_saving(self) -> None:
        # A strong reference: a program that drops the optimizer still has a model to refresh.
        self._prepared: BoundModel | None = None
        self._checkpoints = Checkpoints()
        self._has_left_saving = False
        self._aliases: dict[str, str] = {}
        self._found_step: int | None = None  # the step at which `prepare` found values on the ps tasks

    def refresh(self) -> int:
        """Read the prepared model's values from the ps tasks, as every step does; return the global step. Blocks.

        Changes of buffers since the last step are lost.

        Raises:
            UnavailableError: If a ps is lost.
        """
        for model in self._models:
            model.refresh()
        return self.global_step

    @property
    def global_step(self) -> int:
        """Updates of the model that this worker knows of; with ``pipeline`` also its own that are under way."""
        return self.client.global_step if self.client else 0

    def save(self, directory: str | os.PathLike[str], *, max_to_keep: int | None = 5) -> str | None:
        """Write a checkpoint of the model, the optimizers' state, every `Variable` and the global step.

        The chief has the ps tasks write it, while other workers go on training. On another worker the call does
        nothing, so every worker may make it. Blocks until the checkpoint is complete. It is the folder ``ckpt-STEP`` of
        ``directory``, in the format that an Estimator writes and resumes from; the file ``checkpoint`` in ``directory``
        names it. It loads into any number of ps tasks, and its values load into plain PyTorch. It does not contain
        learning rates and other settings of param groups.

        Args:
            directory: The model_dir: a path, or any URL that fsspec knows. Created if it does not exist.
            max_to_keep: Number of the newest checkpoints to keep; None keeps all.

        Returns:
            The path of the checkpoint; None on a worker that is not the chief.

        Raises:
            RuntimeError: If no model is prepared.
            CheckpointError: If the checkpoint cannot be written.
            ConfigError: If ``max_to_keep`` is negative, or fsspec does not know the URL.
            UnavailableError: If a ps is lost.

        Example:
            >>> import tempfile, torch, paramserver as ps
            >>> strategy, model = ps.ParameterServerStrategy(), torch.nn.Linear(2, 1)
            >>> model, optimizer = strategy.prepare(model, torch.optim.Adam(model.parameters()))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = strategy.save(folder)
            ...     path == strategy.latest_checkpoint(folder), path == strategy.restore(folder)
            (True, True)
        """
        client = self._client_of_model("save")
        if not self.is_chief:
            if not self._has_left_saving:
                logger.info("%s leaves saving to the chief, here and from now on", self.task)
            self._has_left_saving = True
            return None
        self._settle()
        path = self._checkpoints.save(client, os.fspath(directory), max_to_keep, self._aliases)
        logger.info("saved a checkpoint of step %d to %s", checkpoint_step(path), path)
        return path

    def restore(self, directory: str | os.PathLike[str]) -> str | None:
        """Start from a checkpoint: its values, optimizer state, global step and every `Variable`.

        Call it on every worker before `prepare`: the chief's `prepare` then fills the ps tasks from the checkpoint
        instead of from the model, while the others wait in their `prepare` as always. If there is no checkpoint yet,
        `prepare` uses the model's own values. The same program thus starts and resumes.

        After `prepare` it restores at once. If every worker calls it there before the first step, the others wait until
        the chief has restored, or has found no checkpoint, and then hold the chief's values. If it is called later, the
        chief goes back to the checkpoint, and other workers see its values with their next step.

        A chief that was restarted while the ps tasks went on restores nothing before its first step: the ps tasks hold
        newer values. Settings of param groups, such as learning rates, stay as they are. A `Variable` is restored only
        if the program created it before.

        Args:
            directory: A model_dir, whose latest checkpoint is restored, or one checkpoint: a path, or any URL that
                fsspec knows.

        Returns:
            The path of the checkpoint that is restored, or that `prepare` will restore; None if there is none, and on
            a worker that is not the chief.

        Raises:
            CheckpointError: If the checkpoint is truncated or belongs to another model, or ``directory`` names a
                checkpoint that does not exist.
            DeadlineError: On another worker after `prepare`, if the chief does not restore in time.
            UnavailableError: If a ps is lost.
        """
        if not self.is_chief:
            return self._follow_restoring(os.fspath(directory))
        checkpoint = find_checkpoint(os.fspath(directory))
        if self.client is None or self._prepared is None:
            self._checkpoints.begin = checkpoint
            logger.info("prepare begins with %s", checkpoint or f"the model's values: no checkpoint in {directory} yet")
            return checkpoint
        return self._restore_now(self.client, checkpoint, os.fspath(directory))

    @staticmethod
    def latest_checkpoint(model_dir: str | os.PathLike[str]) -> str | None:
        """Return the path of the newest checkpoint in a model_dir; None if there is none, or its files are gone."""
        return model_dirs.latest_checkpoint(os.fspath(model_dir))

    def wait_for_workers(self) -> None:
        """End a training loop: on the chief, wait until every other worker has left or is lost, then `refresh`.

        Afterwards the model, and the next checkpoint of `save`, contain all updates of the run. A worker says goodbye
        with `close`, or when its process ends. On other workers, and in one process, the call returns at once. Blocks
        without a time limit.

        Raises:
            RuntimeError: If no model is prepared.
            UnavailableError: If a ps is lost.
        """
        client = self._client_of_model("wait_for_workers")
        self._settle()
        if self.task is None or not self.is_chief:
            return
        client.await_workers()
        self.refresh()

    def _client_of_model(self, call: str) -> ParameterClient:
        if self.client is None or self._prepared is None:
            raise RuntimeError(f"{call}: {self!r} has prepared no model")
        return self.client

    def _settle(self) -> None:
        for model in self._models:
            model.settle()

    def _begin_values(self, client: ParameterClient, bound: BoundModel) -> int:
        """Initialize the variables in `prepare`: from the checkpoint of `restore`, else with the present values."""
        begin = self._checkpoints.begin
        return present_values(client, bound) if begin is None else self._checkpoints.restore(client, begin)

    def _restore_now(self, client: ParameterClient, checkpoint: str | None, directory: str) -> str | None:
        self._settle()
        found, self._found_step = self._found_step, None
        if found is not None and found == client.local_step and client.is_beyond_restoring():
            self._keep_newer(checkpoint, directory)
            return None
        client.mark_restored(None if checkpoint is None else self._checkpoints.restore(client, checkpoint))
        self.refresh()
        logger.info("restored %s, step %d", checkpoint or f"nothing: no checkpoint in {directory}", self.global_step)
        return checkpoint

    def _follow_restoring(self, directory: str) -> str | None:
        if self.client is None or self._prepared is None:
            logger.info("%s leaves restoring %s to the chief: prepare waits for it", self.task, directory)
            return None
        logger.info("%s leaves restoring %s to the chief, and waits for it", self.task, directory)
        self.client.await_restored(self.session_creation_timeout)
        self.refresh()
        return None

    def _keep_newer(self, checkpoint: str | None, directory: str) -> None:
        """Restore nothing, but remember the checkpoint: a ps may be lost later."""
        if checkpoint is not None:
            self._checkpoints.last = absolute(checkpoint)
        logger.info(
            "%s restores nothing from %s: the ps tasks hold newer values, of step %d",
            self._shown_task,
            directory,
            self.global_step,
        )

    def _bring_back(self, model: BoundModel) -> int:
        """Fill the variables on the chief after a loss, warn of what is lost, and return the values' global step."""
        client = self._client_of_model("recover")
        before, of_values = client.global_step, client.local_step
        loss = checkpoints.Loss.of(client, max(before, client.read_global_step()))
        client.global_step = before
        if (last := self._checkpoints.last) is None:
            logger.warning("%s", loss.without_checkpoint(of_values))
            return present_values(client, model)
        step = self._checkpoints.restore(client, last)
        logger.warning("%s", loss.with_checkpoint(last, step, saved_names(last)))
        return step

    @property
    def _shown_task(self) -> str:
        return str(self.task or ALONE)


def present_values(client: ParameterClient, bound: BoundModel) -> int:
    """Fill the variables with the values that this task holds, and return the global step of these values."""
    bound.assign()
    return client.global_step
