"""The indexes of a checkpoint, which name the file of each tensor, and the names of these files.

Both sides of a run use them: the ps tasks write and read shards, the chief writes the indexes, and all other tasks only
read.

Rules
    * Every tensor is in one file, whole, even if its rows come from several ps tasks. So a checkpoint loads into any
      number of ps tasks with any partitioning, and any reader of safetensors can read all of it.
    * The rows of such a tensor follow one another in its file, whose header depends only on its name, dtype and shape.
      So each ps writes the header and its own rows, and none waits for another.
"""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from paramserver.errors import CheckpointError

VALUES_INDEX = "model.safetensors.index.json"
SLOTS_INDEX = "optimizer.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
"""The only file of values in an exported model."""
VALUES_PREFIX = "model"
"""Prefix of the names of all files of values, and of no other files."""
LONGEST_NAME = 200
"""Characters of a file name that identify the variable: file systems limit names to 255 bytes in all."""

# Without a hyphen, the name of a variable cannot give the name of a shard's file, such as model-00001-of-00002. Without
# capital letters, names that differ only in those give two files even on a file system that ignores case.
_PLAIN = frozenset(string.ascii_lowercase + string.digits + "_.~")


# --- indexes -----------------------------------------------------------------------------------------------------


class _Metadata(msgspec.Struct):
    program_variables: tuple[str, ...] = ()
    aliases: dict[str, str] = {}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: _Metadata | None = None


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor from an index.

    Raises:
        CheckpointError: If the index is missing or malformed.
    """
    return _decoded(path).weight_map


def read_aliases(path: Path) -> dict[str, str]:
    """Return other names of tied weights from an index, and the variable that each name stands for.

    Raises:
        CheckpointError: If the index is missing or malformed.
    """
    metadata = _decoded(path).metadata
    return metadata.aliases if metadata else {}


def unclaimed(path: Path, known: Collection[str]) -> list[str]:
    """Return the variables of an index that a model does not have, sorted, without the program's own variables.

    Args:
        path: The index of values.
        known: The names that the model has.

    Raises:
        CheckpointError: If the index is missing or malformed.
    """
    index = _decoded(path)
    own = index.metadata.program_variables if index.metadata else ()
    return sorted(index.weight_map.keys() - set(known) - set(own))


def _decoded(path: Path) -> _Index:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not an index of a checkpoint: {error}", str(path)) from error


def write_index(path: Path, weight_map: Mapping[str, str], **metadata: object) -> None:
    """Write an index as Hugging Face's tools read it.

    Raises:
        CheckpointError: If the index cannot be written.
    """
    text = json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2)
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"writing the index {path} failed: {error}", str(path)) from error


def digest(directory: Path) -> str:
    """Return a digest that tells a checkpoint from others in a folder of the same name; "" if there is no checkpoint.

    The ``id`` that the chief writes into the index of values is different for each checkpoint.
    """
    try:
        return hashlib.sha256((directory / VALUES_INDEX).read_bytes()).hexdigest()
    except OSError:
        return ""


class Maps(NamedTuple):
    """The files written: that of each variable, and that of each slot, such as ``fc.weight/exp_avg``."""

    weight_map: dict[str, str]
    slot_map: dict[str, str]


def merge_maps(written: Iterable[Maps]) -> Maps:
    """Merge the maps of several writers.

    For a variable whose rows come from several writers, slots count only if all writers wrote the same ones. That is
    the case, except during the first update of the variable: then some writers have no slots yet, and unwritten rows
    read as zeros, which is not the initial state of every optimizer. Without any slots, the variable begins anew.

    Raises:
        CheckpointError: If two variables of the same name were written, because a reader would find only one.

    >>> some = Maps({"table": "a", "bias": "b"}, {"table/exp_avg": "c", "bias/exp_avg": "d"})
    >>> merge_maps([some, Maps({"table": "a"}, {})]).slot_map
    {'bias/exp_avg': 'd'}
    """
    values: dict[str, str] = {}
    slots: dict[str, str] = {}
    versions: dict[str, set[frozenset[str]]] = defaultdict(set)
    for weight_map, slot_map in written:
        for variable, file in weight_map.items():
            if values.setdefault(variable, file) != file:
                raise name_clash(variable, file)
        slots.update(slot_map)
        by_variable: dict[str, set[str]] = {variable: set() for variable in weight_map}
        for key in slot_map:
            by_variable[variable_of(key)].add(key)
        for variable, keys in by_variable.items():
            versions[variable].add(frozenset(keys))
    return Maps(values, {key: file for key, file in slots.items() if len(versions[variable_of(key)]) == 1})


def name_clash(variable: str, file: str) -> CheckpointError:
    """Return the error for two variables with the same name, as a checkpoint identifies variables by name."""
    return CheckpointError(
        f"writing a checkpoint: there are two variables called {variable!r}, as may be of a model and of a program; "
        "give one of them another name",
        file,
    )


def variable_of(key: str) -> str:
    """Return the variable that a slot belongs to.

    >>> variable_of("fc.weight/exp_avg")
    'fc.weight'
    """
    return key.rpartition("/")[0]


def rows_files(variable: str) -> tuple[str, str]:
    """Return the names of the files for the values and the slots of a variable whose rows several tasks write.

    >>> rows_files("tables/users-00001")
    ('model-tables%2Fusers%2D00001.safetensors', 'optimizer-tables%2Fusers%2D00001.safetensors')
    """
    quoted = "".join(each if each in _PLAIN else "".join(f"%{byte:02X}" for byte in each.encode()) for each in variable)
    if len(quoted) > LONGEST_NAME:
        known_by = hashlib.sha256(variable.encode()).hexdigest()[:32]
        quoted = f"{quoted[: LONGEST_NAME - len(known_by) - 1]}={known_by}"  # "=" is never in a quoted name
    return f"model-{quoted}.safetensors", f"optimizer-{quoted}.safetensors"


# --- reading -----------------------------------------------------------------------------------------------------
