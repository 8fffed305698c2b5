"""Reading of checkpoints without a ps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from paramserver.checkpoint.index import SLOTS_INDEX, VALUES_INDEX, VALUES_PREFIX, read_index, unclaimed
from paramserver.checkpoint.model_dir import checkpoint_step, latest_checkpoint, readable
from paramserver.checkpoint.reading import read_shapes, read_tensors
from paramserver.distribute.bound.plan import load_values, plain_name
from paramserver.errors import CheckpointError
from paramserver.layout.variables import DTYPES


def load_model(model: nn.Module, checkpoint_path: str) -> list[str]:
    """Fill a plain module with the values of a checkpoint, in place.

    The program's own variables in the checkpoint are ignored.

    Returns:
        The other variables of the checkpoint that the model does not have.

    Raises:
        CheckpointError: If the checkpoint is truncated or belongs to another model.
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
    """Read every variable of a checkpoint; return the values by name.

    Raises:
        CheckpointError: If a file is missing or truncated.
    """
    with readable(checkpoint_path, f"{VALUES_PREFIX}*") as folder:
        return dict(read_tensors(folder, read_index(folder / VALUES_INDEX)))


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The contents of a checkpoint.

    Attributes:
        path: The folder.
        step: The global step in its name.
        variables: Name, dtype, shape and bytes of each variable; a partitioned variable counts as one.
        slots: The names of the optimizer's slots.
    """

    path: str
    step: int
    variables: list[tuple[str, str, tuple[int, ...], int]]
    slots: list[str]


def inspect_checkpoint(checkpoint_path: str) -> CheckpointInfo:
    """Read the list of a checkpoint's contents, without reading the values.

    Args:
        checkpoint_path: The path or URL of a checkpoint, or of a model_dir for its latest checkpoint.

    Raises:
        CheckpointError: If it is not a checkpoint, or is truncated.
    """
    checkpoint_path = latest_checkpoint(checkpoint_path) or checkpoint_path
    with readable(checkpoint_path) as path:
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a checkpoint: expected a folder like model_dir/ckpt-100", str(path))
        slots = {key.rpartition("/")[2] for key in read_index(path / SLOTS_INDEX)}
        return CheckpointInfo(
            path=checkpoint_path, step=checkpoint_step(checkpoint_path), variables=_described(path), slots=sorted(slots)
        )


def _described(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [
        (name, dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)
        for name, dtype, shape in read_shapes(path, read_index(path / VALUES_INDEX))
    ]
