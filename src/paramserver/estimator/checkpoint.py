"""A whole checkpoint: the ps tasks write the shards, the chief the indexes; anyone can read it.

A checkpoint is a folder of plain safetensors files. ``model.safetensors.index.json`` has the form that Hugging Face's
tools read; ``optimizer.safetensors.index.json`` does the same for optimizer state. Each variable is one tensor, also
one that was partitioned.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from paramserver.arena import DTYPES
from paramserver.checkpoint_files import (
    SLOTS_INDEX,
    VALUES_INDEX,
    VALUES_PREFIX,
    Maps,
    merge,
    read_index,
    read_shapes,
    read_tensors,
    unclaimed,
    write_index,
)
from paramserver.client import ParameterClient
from paramserver.distribute.variables import load_values, plain_name
from paramserver.errors import CheckpointError, NotFiniteError
from paramserver.estimator.checkpoint_state import CheckpointManager, checkpoint_step, readable

logger = logging.getLogger(__name__)

SHOWN_NAMES = 8


def write_checkpoint(client: ParameterClient, manager: CheckpointManager, step: int, aliases: dict[str, str]) -> str:
    """Have the ps tasks write a checkpoint, and publish it; its path. Blocks; pushes of workers go on meanwhile.

    Args:
        client: Connected to every ps.
        manager: Of the model_dir.
        step: The global step that names it; what it holds is at least as new.
        aliases: Other names of tied variables.

    Raises:
        CheckpointError: If a ps or this task cannot write it.
        NotFiniteError: If a trained variable is not finite; the message says how to go on.
    """
    folder = manager.temporary_path(step)
    try:
        saved = client.save(folder)
        maps = merge(Maps(shard.weight_map, shard.slot_map) for shard in saved)
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
    cause = "a lower learning rate, clipped gradients, or without the batches that it came from"
    return NotFiniteError(f"checkpoint {path} is not written: {error}; {way}, with {cause}", path, error.variable)


def restore_checkpoint(client: ParameterClient, checkpoint_path: str) -> None:
    """Have the ps tasks read their variables from a checkpoint, and say what it holds beside them. Blocks.

    Raises:
        CheckpointError: If it is cut short or belongs to another model.
    """
    with readable(checkpoint_path) as folder:
        client.restore(str(folder.absolute()))
        say_left_out(checkpoint_path, unclaimed(folder / VALUES_INDEX, client.variables.known))


def say_left_out(checkpoint_path: str, names: Sequence[str]) -> None:
    """Warn of variables of a checkpoint that the model does not have, if there are any."""
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
    identity = secrets.token_hex(8)  # see `checkpoint_files.digest`
    write_index(folder / VALUES_INDEX, maps.weight_map, global_step=step, id=identity, **metadata)


def load_model(model: nn.Module, checkpoint_path: str) -> list[str]:
    """Fill a plain module with the values of a checkpoint, in place.

    A program's own variables in it are left alone.

    Returns:
        The other variables of the checkpoint that the model does not have.

    Raises:
        CheckpointError: If the checkpoint is cut short or belongs to another model.
    """
    with readable(checkpoint_path, f"{VALUES_PREFIX}*") as folder:
        values = dict(read_tensors(folder, read_index(folder / VALUES_INDEX)))
        expected = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        left_out = unclaimed(folder / VALUES_INDEX, expected)
    first: dict[int, str] = {}
    for name, tensor in expected.items():
        source = first.setdefault(id(tensor), name)
        if source in values:
            values.setdefault(name, values[source])
    try:
        load_values(model, {name: value for name, value in values.items() if name in expected})
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint {checkpoint_path} does not fit the model: {error}; does it belong to another model?",
            checkpoint_path,
        ) from error
    return left_out


def read_values(checkpoint_path: str) -> dict[str, torch.Tensor]:
    """Every variable of a checkpoint by name.

    Raises:
        CheckpointError: If a file is missing or cut short.
    """
    with readable(checkpoint_path, f"{VALUES_PREFIX}*") as folder:
        return dict(read_tensors(folder, read_index(folder / VALUES_INDEX)))


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        path: The folder.
        step: The global step in its name.
        variables: Name, dtype, shape and bytes of each variable; one that was partitioned is one.
        slots: The names of the optimizer's slots.
    """

    path: str
    step: int
    variables: list[tuple[str, str, tuple[int, ...], int]]
    slots: list[str]


def inspect_checkpoint(checkpoint_path: str) -> CheckpointInfo:
    """Read what a checkpoint holds, without reading the values.

    Raises:
        CheckpointError: If it is no checkpoint, or cut short.
    """
    with readable(checkpoint_path) as path:
        if not path.is_dir():
            raise CheckpointError(f"{path} is no checkpoint: expected a folder such as model_dir/ckpt-100", str(path))
        slots = {key.rpartition("/")[2] for key in read_index(path / SLOTS_INDEX)}
        return CheckpointInfo(
            path=checkpoint_path, step=checkpoint_step(checkpoint_path), variables=_described(path), slots=sorted(slots)
        )


def _described(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [
        (name, dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)
        for name, dtype, shape in read_shapes(path, read_index(path / VALUES_INDEX))
    ]
