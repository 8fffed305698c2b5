"""Checkpoints of what the ps tasks hold: they write the shards, the chief the indexes.

A checkpoint is a folder of plain safetensors files. ``model.safetensors.index.json`` has the form that Hugging Face's
tools read; ``optimizer.safetensors.index.json`` does the same for optimizer state. Each variable is one tensor, also
one that was partitioned.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from paramserver.checkpoint.model_dir import CheckpointManager, readable
from paramserver.checkpoint_files import SLOTS_INDEX, VALUES_INDEX, Maps, merge, write_index
from paramserver.client import ParameterClient

logger = logging.getLogger(__name__)


def write_checkpoint(client: ParameterClient, manager: CheckpointManager, step: int, aliases: dict[str, str]) -> str:
    """Have the ps tasks write a checkpoint, and publish it; its path. Blocks; pushes of workers go on meanwhile.

    Args:
        client: Connected to every ps.
        manager: Of the model_dir.
        step: The global step that names it; what it holds is at least as new.
        aliases: Other names of tied variables.

    Raises:
        CheckpointError: If a ps or this task cannot write it.
    """
    folder = manager.temporary_path(step)
    try:
        saved = client.save(folder)
        maps = merge(Maps(shard.weight_map, shard.slot_map) for shard in saved)
        _write_indexes(Path(folder), maps, step, total_size=sum(shard.nbytes for shard in saved), aliases=aliases)
        path = manager.publish(folder, step)
    except BaseException:
        manager.discard(folder)
        raise
    pauses = (max(shard.pause for shard in saved), max(shard.longest_pause for shard in saved))
    logger.debug("checkpoint of step %d: pushes were kept waiting for %.3g s in all, %.3g s at once", step, *pauses)
    return path


def restore_checkpoint(client: ParameterClient, checkpoint_path: str) -> None:
    """Have the ps tasks read their variables from a checkpoint. Blocks.

    Raises:
        CheckpointError: If it is cut short or belongs to another model.
    """
    with readable(checkpoint_path) as folder:
        client.restore(str(folder.absolute()))


def _write_indexes(folder: Path, maps: Maps, step: int, **metadata: object) -> None:
    write_index(folder / SLOTS_INDEX, maps.slot_map, global_step=step)
    identity = secrets.token_hex(8)  # see `checkpoint_files.digest`
    write_index(folder / VALUES_INDEX, maps.weight_map, global_step=step, id=identity, **metadata)
