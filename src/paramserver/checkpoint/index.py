"""The indexes of a checkpoint, which say in which file each tensor stands, and the names of those files.

Both sides of a run know them: the ps tasks write and read shards, the chief writes the indexes, and everyone else
only reads.

Rules
    * Every tensor stands in one file, whole, also one whose rows lie on several ps tasks. So a checkpoint loads into
      any number of ps tasks and any partitioning, and what reads safetensors reads all of it.
    * The rows of such a tensor lie one after the other in its file, whose header follows from its name, dtype and
      shape. So each ps writes the header and its own rows, and none waits for another.
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
"""The only file of values of an exported model."""
VALUES_PREFIX = "model"
"""What the names of all files of values begin with, and of no others."""
LONGEST_NAME = 200
"""Characters of a file's name that tell the variable: a file system takes names of 255 bytes in all."""

# Without a hyphen it cannot be the name of a shard's file, such as model-00001-of-00002. Without capital letters names
# that differ in those alone are two files also where a file system does not tell them apart.
_PLAIN = frozenset(string.ascii_lowercase + string.digits + "_.~")


# --- indexes -----------------------------------------------------------------------------------------------------


class _Metadata(msgspec.Struct):
    program_variables: tuple[str, ...] = ()


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: _Metadata | None = None


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        CheckpointError: If the index is missing or is none.
    """
    return _decoded(path).weight_map


def unclaimed(path: Path, known: Collection[str]) -> list[str]:
    """The variables of an index that a model does not have, sorted; a program's own variables are not among them.

    Args:
        path: The index of values.
        known: The names that the model has.

    Raises:
        CheckpointError: If the index is missing or is none.
    """
    index = _decoded(path)
    own = index.metadata.program_variables if index.metadata else ()
    return sorted(index.weight_map.keys() - set(known) - set(own))


def _decoded(path: Path) -> _Index:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no index of a checkpoint: {error}", str(path)) from error


def write_index(path: Path, weight_map: Mapping[str, str], **metadata: object) -> None:
    """Write an index as Hugging Face's tools read it.

    Raises:
        CheckpointError: If it cannot be written.
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
    """What tells a checkpoint from others that may lie in a folder of the same name; "" where there is none.

    The ``id`` that the chief writes into the index of values differs for each checkpoint.
    """
    try:
        return hashlib.sha256((directory / VALUES_INDEX).read_bytes()).hexdigest()
    except OSError:
        return ""


class Maps(NamedTuple):
    """What was written: the file of each variable, and of each slot, such as ``fc.weight/exp_avg``."""

    weight_map: dict[str, str]
    slot_map: dict[str, str]


def merge_maps(written: Iterable[Maps]) -> Maps:
    """What several have written, as one.

    Of a variable whose rows several wrote, the slots count only where all of them wrote the same ones. They do, but
    while the first update of the variable is under way: then some have no slots yet, and what is not written reads as
    zeros, which is not where every optimizer begins. Without any it begins by itself.

    Raises:
        CheckpointError: If two variables of one name were written, of which a reader would find one.

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
    """Two variables of a run have one name, and a checkpoint knows them by their names."""
    return CheckpointError(
        f"writing a checkpoint: there are two variables called {variable!r}, as may be of a model and of a program; "
        "give one of them another name",
        file,
    )


def variable_of(key: str) -> str:
    """The variable that a slot belongs to.

    >>> variable_of("fc.weight/exp_avg")
    'fc.weight'
    """
    return key.rpartition("/")[0]


def rows_files(variable: str) -> tuple[str, str]:
    """The names of the files for the values and the slots of a variable whose rows several write.

    >>> rows_files("tables/users-00001")
    ('model-tables%2Fusers%2D00001.safetensors', 'optimizer-tables%2Fusers%2D00001.safetensors')
    """
    quoted = "".join(each if each in _PLAIN else "".join(f"%{byte:02X}" for byte in each.encode()) for each in variable)
    if len(quoted) > LONGEST_NAME:
        known_by = hashlib.sha256(variable.encode()).hexdigest()[:32]
        quoted = f"{quoted[: LONGEST_NAME - len(known_by) - 1]}={known_by}"  # what is quoted has no such sign
    return f"model-{quoted}.safetensors", f"optimizer-{quoted}.safetensors"


# --- reading -----------------------------------------------------------------------------------------------------
