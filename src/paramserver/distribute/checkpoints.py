"""Checkpoints of the ps tasks' variables: the ps tasks write the shards, the chief writes the indexes.

A checkpoint is a folder of plain safetensors files. ``model.safetensors.index.json`` has the form that Hugging Face's
tools read; ``optimizer.safetensors.index.json`` does the same for optimizer state. Each variable is one tensor, even
if it was partitioned.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from paramserver.checkpoint.index import SLOTS_INDEX, VALUES_INDEX, Maps, merge_maps, read_index, unclaimed, write_index
from paramserver.checkpoint.model_dir import (
    CheckpointManager,
    checkpoint_step,
    checkpoint_to_restore,
    is_name,
    is_whole,
    readable,
)
from paramserver.checkpoint.storage import absolute
from paramserver.client.client import ParameterClient
from paramserver.cluster import environment
from paramserver.errors import CheckpointError, NotFiniteError

logger = logging.getLogger(__name__)

SHOWN_NAMES = 8


def write_checkpoint(client: ParameterClient, manager: CheckpointManager, step: int, aliases: dict[str, str]) -> str:
    """Have the ps tasks write a checkpoint, publish it, and return its path. Blocks; workers can push meanwhile.

    Args:
        client: Connected to every ps.
        manager: The manager of the model_dir.
        step: The global step in the checkpoint's name; its contents are at least as new.
        aliases: Other names of tied variables.

    Raises:
        CheckpointError: If a ps or this task cannot write it.
        NotFiniteError: If a trained variable is not finite; the message says how to go on.
    """
    folder = manager.temporary_path(step)
    try:
        saved = client.save(folder)
        maps = merge_maps(Maps(shard.weight_map, shard.slot_map) for shard in saved)
        _write_indexes(
            Path(folder),
            maps,
            step,
            total_size=sum(shard.nbytes for shard in saved),
            aliases=aliases,
            program_variables=sorted(client.variables.names & maps.weight_map.keys()),
        )
        path = manager.publish(folder, step)
    except NotFiniteError as error:
        manager.discard(folder)
        raise _with_way_back(error, manager, step) from error
    except BaseException:
        manager.discard(folder)
        raise
    pauses = (max(shard.pause for shard in saved), max(shard.longest_pause for shard in saved))
    logger.debug("checkpoint of step %d: pushes were kept waiting for %.3g s in all, %.3g s at once", step, *pauses)
    return path


def _with_way_back(error: NotFiniteError, manager: CheckpointManager, step: int) -> NotFiniteError:
    latest, path = manager.state.latest, manager.save_path(step)
    if latest:
        good = manager.save_path(checkpoint_step(latest))
        way = f"the last good checkpoint is {good}: start the run again to go on from it"
    else:
        way = "there is no good checkpoint: start the run again from the beginning"
    cause = "a lower learning rate, clipped gradients, or without the batches that caused it"
    return NotFiniteError(f"checkpoint {path} is not written: {error}; {way}, with {cause}", path, error.variable)


def restore_checkpoint(client: ParameterClient, checkpoint_path: str) -> None:
    """Have the ps tasks read their variables from a checkpoint, and warn of any others in it. Blocks.

    Raises:
        CheckpointError: If the checkpoint is truncated or belongs to another model.
    """
    with readable(checkpoint_path) as folder:
        client.restore(str(folder.absolute()))
        say_left_out(checkpoint_path, unclaimed(folder / VALUES_INDEX, client.variables.known))


def say_left_out(checkpoint_path: str, names: Sequence[str]) -> None:
    """Warn of the variables of a checkpoint that the model does not have, if there are any."""
    if names:
        more = f" and {len(names) - SHOWN_NAMES} others" if len(names) > SHOWN_NAMES else ""
        logger.warning(
            "checkpoint %s holds %d variables that the model does not have, and that are left out: %s%s",
            checkpoint_path,
            len(names),
            ", ".join(map(repr, names[:SHOWN_NAMES])),
            more,
        )


def _write_indexes(folder: Path, maps: Maps, step: int, **metadata: object) -> None:
    write_index(folder / SLOTS_INDEX, maps.slot_map, global_step=step)
    identity = secrets.token_hex(8)  # see `checkpoint.index.digest`
    write_index(folder / VALUES_INDEX, maps.weight_map, global_step=step, id=identity, **metadata)


def find_checkpoint(directory: str) -> str | None:
    """Return the checkpoint at a path: the path itself, or the latest of a model_dir; None if there is none.

    Raises:
        CheckpointError: If the path has a checkpoint's name but holds no checkpoint, or the latest one is damaged.
    """
    if is_whole(directory):
        return directory
    if is_name(directory):
        raise CheckpointError(
            f"checkpoint {directory} is not there, or is cut short: expected {VALUES_INDEX} in it", directory
        )
    return checkpoint_to_restore(directory)


def saved_names(checkpoint: str) -> set[str]:
    """Return the names of the variables in a checkpoint. Raises CheckpointError if it cannot be read."""
    with readable(checkpoint, VALUES_INDEX) as folder:
        return set(read_index(folder / VALUES_INDEX))


class Checkpoints:
    """The checkpoints that a strategy starts from and has written. Only the chief uses them. Not thread-safe.

    Attributes:
        begin: The checkpoint that `prepare` restores; None for the model's own values.
        last: The checkpoint last written or restored, to go back to after the loss of a ps; None before there is one.
    """

    def __init__(self) -> None:
        self.begin: str | None = None
        self.last: str | None = None
        self._entered: set[str] = set()

    def save(self, client: ParameterClient, directory: str, max_to_keep: int | None, names: dict[str, str]) -> str:
        """Write a checkpoint of the present global step, and return its path. Blocks.

        Args:
            client: Connected to every ps.
            directory: The model_dir, a path or URL.
            max_to_keep: Number of the newest checkpoints to keep; None keeps all.
            names: Other names of tied variables.

        Raises:
            CheckpointError: If the checkpoint cannot be written.
            ConfigError: If ``max_to_keep`` is negative, or fsspec does not know the URL.
        """
        manager = CheckpointManager(directory, max_to_keep)
        if absolute(directory) not in self._entered:
            manager.remove_leftovers()
            # With the run's id an evaluator does not mistake an earlier run's end for this run's.
            manager.mark_started(environment.read().run_id)
            self._entered.add(absolute(directory))
        path = write_checkpoint(client, manager, client.read_global_step(), names)
        self.last = absolute(path)
        return path

    def restore(self, client: ParameterClient, checkpoint: str) -> int:
        """Fill the ps tasks' variables from a checkpoint; return its step. Blocks; raises as `restore_checkpoint`."""
        step = checkpoint_step(checkpoint)
        restore_checkpoint(client, checkpoint)
        self.last = absolute(checkpoint)
        return step

    def __repr__(self) -> str:
        return f"<Checkpoints: last {self.last}>"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The state that a run loses with the memory of ps tasks.

    Attributes:
        tasks: The names of the ps tasks.
        reached: The global step that the run had reached.
        variables: Number of the model's variables, or parts of variables, on these tasks.
        own: The names of the program's own variables on these tasks.
    """

    tasks: str
    reached: int
    variables: int
    own: list[str]

    @classmethod
    def of(cls, client: ParameterClient, reached: int) -> Loss:
        """Return the loss of the ps tasks that a client has found empty."""
        lanes = client.lanes.each()
        return cls(
            tasks=", ".join(lanes[ps].task for ps in client.emptied),
            reached=reached,
            variables=sum(client.num_variables(ps) for ps in client.emptied),
            own=[name for ps in client.emptied for name in client.variables.made_on(ps)],
        )

    def with_checkpoint(self, checkpoint: str, step: int, saved: Collection[str]) -> str:
        """Return the warning for a run that goes back to a checkpoint with variables of these names."""
        return (
            f"{self.tasks} came back empty; all ps tasks go back to {checkpoint}: {lost_updates(self.reached, step)}"
            f"{_anew([name for name in self.own if name not in saved])}"
        )

    def without_checkpoint(self, step: int) -> str:
        """Return the warning for a run without a checkpoint, whose chief holds the values of a step."""
        return (
            f"{self.tasks} came back empty, and this run has saved no checkpoint: the model goes on with the chief's "
            f"values of step {step}, and {max(self.reached - step, 0)} later updates are lost; the optimizer state of "
            f"{self.variables} variables there starts anew{_anew(self.own)}. "
            "Call strategy.save(directory) regularly, so that recover() can restore a checkpoint"
        )


def _anew(names: list[str]) -> str:
    return f"; {len(names)} ps.Variables go back to their first values: {', '.join(names)}" if names else ""


def lost_updates(reached: int, step: int) -> str:
    """Return a text of how many updates a run loses that goes back from the step it has reached to an earlier one.

    >>> lost_updates(500, 401)
    '99 updates are lost (back from step 500 to 401)'
    """
    return f"{max(reached - step, 0)} updates are lost (back from step {reached} to {step})"
