"""What a loop of one's own needs to save, to resume and to end; a part of `ParameterServerStrategy`.

Rules
    * The chief decides and the ps tasks write and read. Every call may be made alike on every worker.
    * Nothing is restored over newer values: a chief that was started again goes on with what the ps tasks hold.
    * Workers see restored values at one point: in `prepare`, or in a `restore` that follows it before the first step.
      They wait there for the chief, but for no chief that trains already.
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
        client: Connected to the ps tasks; None before.
    """

    task: TaskId | None
    client: ParameterClient | None
    _models: weakref.WeakSet[BoundModel]

    def _begin_saving(self) -> None:
        # Kept: a program that lets go of the optimizer still has a model to refresh.
        self._prepared: BoundModel | None = None
        self._checkpoints = Checkpoints()
        self._has_left_saving = False
        self._aliases: dict[str, str] = {}
        self._found_step: int | None = None  # at which `prepare` found values on the ps tasks

    def refresh(self) -> int:
        """Bring the prepared model up to date with the ps tasks, as every step does; the global step. Blocks.

        What buffers changed by since the last step is lost.

        Raises:
            UnavailableError: If a ps is lost.
        """
        for model in self._models:
            model.refresh()
        return self.global_step

    @property
    def global_step(self) -> int:
        """Updates of the model, as this worker last heard of them; with ``pipeline``, and its own on the way."""
        return self.client.global_step if self.client else 0

    def save(self, directory: str | os.PathLike[str], *, max_to_keep: int | None = 5) -> str | None:
        """Write a checkpoint of the model, the optimizers' state, every `Variable` and the global step.

        The chief has the ps tasks write it, while other workers go on training; a call on another worker does nothing,
        so every worker may call it alike. Blocks until the checkpoint is whole. It is the folder ``ckpt-STEP`` of
        ``directory``, in the form that an Estimator writes and goes on from, and names itself in the file
        ``checkpoint`` there. It loads into any number of ps tasks, and its values into plain PyTorch. Learning rates
        and other settings of param groups are not in it.

        Args:
            directory: The model_dir: a path, or any URL that fsspec knows. Made if need be.
            max_to_keep: How many of the newest checkpoints stay there; None for all.

        Returns:
            The path of the checkpoint; None on a worker that is not the chief.

        Raises:
            RuntimeError: If no model is prepared.
            CheckpointError: If it cannot be written.
            ConfigError: If ``max_to_keep`` is negative, or fsspec knows no such URL.
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
        """Begin with a checkpoint: its values, optimizer state, every `Variable` and its global step.

        Call it on every worker, before `prepare`: the chief's `prepare` then fills the ps tasks from the checkpoint
        instead of from the model, while the others wait in theirs as they always do. Where there is no checkpoint yet,
        `prepare` takes the model's own values. So the same program starts and resumes.

        After `prepare` it restores at once. Called there before the first step, on every worker, the others wait until
        the chief has restored, or has found no checkpoint, and have its values then. Called later, the chief goes back
        to the checkpoint, and other workers see its values with their next step.

        A chief that was started again while the ps tasks went on restores nothing before its first step: what they
        hold is newer. Settings of param groups, such as learning rates, stay as they are. A `Variable` is restored if
        it was created before.

        Args:
            directory: A model_dir, of which it takes the latest checkpoint, or one checkpoint: a path, or any URL that
                fsspec knows.

        Returns:
            The path of the checkpoint that is restored, or that `prepare` is to begin with; None if there is none, and
            on a worker that is not the chief.

        Raises:
            CheckpointError: If the checkpoint is cut short or belongs to another model, or one that is named is not
                there.
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
        """The path of the newest checkpoint in a model_dir; None if there is none, or its files are gone."""
        return model_dirs.latest_checkpoint(os.fspath(model_dir))

    def wait_for_workers(self) -> None:
        """The end of a loop: on the chief, wait until every other worker has said goodbye or is lost, then `refresh`.

        Then the model, and what `save` writes, hold all updates of the run. A worker says goodbye with `close`, or when
        its process ends. On other workers, and in one process, it returns at once. Blocks for as long as they take.

        Raises:
            RuntimeError: If no model is prepared.
            UnavailableError: If a ps is lost.
        """
        client = self._client_of_model("wait_for_workers")
        self._settle()
        if self.task is None or not self.is_chief:
            return
        waiting = checkpoints.Waiting(str(self.task))
        client.await_workers(waiting.on_wait)
        self.refresh()

    def _client_of_model(self, call: str) -> ParameterClient:
        if self.client is None or self._prepared is None:
            raise RuntimeError(f"{call}: {self!r} has prepared no model")
        return self.client

    def _settle(self) -> None:
        for model in self._models:
            model.settle()

    def _begin_values(self, client: ParameterClient, bound: BoundModel) -> int:
        """How `prepare` initializes."""
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
        """Nothing is restored; but a ps may be lost later."""
        if checkpoint is not None:
            self._checkpoints.last = absolute(checkpoint)
        logger.info(
            "%s restores nothing from %s: the ps tasks hold newer values, of step %d",
            self._shown_task,
            directory,
            self.global_step,
        )

    def _bring_back(self, model: BoundModel) -> int:
        """The chief fills the variables after a loss; says what is lost."""
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
    """Fill the variables with the values that this task has; the global step that they belong to."""
    bound.assign()
    return client.global_step
