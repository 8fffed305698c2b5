"""The files of a checkpoint: plain safetensors, and an index that says which of them holds what.

Both sides of a run know them: the ps tasks write and read shards, the chief writes the indexes, and everyone else
only reads.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from paramserver.errors import CheckpointError

VALUES_INDEX = "model.safetensors.index.json"
SLOTS_INDEX = "optimizer.safetensors.index.json"

T = TypeVar("T")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        CheckpointError: If the index is missing or is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no index of a checkpoint: {error}", str(path)) from error


def write_index(path: Path, weight_map: Mapping[str, str], **metadata: object) -> None:
    """Write an index as Hugging Face's tools read it.

    Raises:
        CheckpointError: If it cannot be written.
    """
    try:
        path.write_text(json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2))
    except OSError as error:
        raise CheckpointError(f"writing the index {path} failed: {error}", str(path)) from error


def read_tensors(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors, one after the other, file by file.

    Raises:
        CheckpointError: If a file is missing or cut short, or does not hold what its index says.
    """
    return _each(directory, weight_map, lambda file, name: file.get_tensor(name))


def read_shapes(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor, without reading it; raises as `read_tensors`."""
    for name, found in _each(directory, weight_map, lambda file, name: file.get_slice(name)):
        yield name, _DTYPES.get(found.get_dtype(), found.get_dtype()), tuple(found.get_shape())


def _each(
    directory: Path, weight_map: Mapping[str, str], read: Callable[[Any, str], T]
) -> Iterator[tuple[str, T]]:
    files: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        files[file].append(name)
    for file, names in files.items():
        path = directory / file
        try:
            with safe_open(path, "pt") as opened:
                for name in names:
                    yield name, read(opened, name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint file {path} cannot be read: {error}; was it cut short?", str(path)
            ) from error


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
