"""The files of a checkpoint: plain safetensors, and an index that says which of them holds what.

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
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from paramserver.arena import DTYPES, Range, tensor_bytes
from paramserver.checkpoint_folder import CheckpointFolder, Read, read_header
from paramserver.errors import CheckpointError
from paramserver.tensor_file import FileTensor, unreadable

VALUES_INDEX = "model.safetensors.index.json"
SLOTS_INDEX = "optimizer.safetensors.index.json"
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


def merge(written: Iterable[Maps]) -> Maps:
    """What several have written, as one.

    Of a variable whose rows several wrote, the slots count only where all of them wrote the same ones. They do, but
    while the first update of the variable is under way: then some have no slots yet, and what is not written reads as
    zeros, which is not where every optimizer begins. Without any it begins by itself.

    Raises:
        CheckpointError: If two variables of one name were written, of which a reader would find one.

    >>> some = Maps({"table": "a", "bias": "b"}, {"table/exp_avg": "c", "bias/exp_avg": "d"})
    >>> merge([some, Maps({"table": "a"}, {})]).slot_map
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


class StoredTensor:
    """A tensor in an open folder: its dtype and shape are known, and any of its rows can be read.

    Attributes:
        name: Its name.
        dtype: The name of its dtype.
        shape: The shape of all of it.
    """

    def __init__(self, folder: CheckpointFolder, file: str, tensor: FileTensor) -> None:
        self._folder, self._file, self._begin = folder, file, tensor.begin
        self.name = tensor.name
        self.dtype, self.shape = tensor.spec

    def read(self, rows: Range | None = None) -> torch.Tensor:
        """The rows ``[start, stop)`` of it; all of it without them, and where it is a scalar.

        Raises:
            CheckpointError: If they cannot be read.
        """
        start, stop = rows if rows is not None and self.shape else (0, self.shape[0] if self.shape else 1)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        tensor = torch.empty(shape, dtype=DTYPES[self.dtype], device="cpu")
        out = tensor_bytes(tensor.view(-1))
        offset = self._begin + start * (out.nbytes // max(stop - start, 1))
        self._folder.carry_out(Read(self._file, offset, out))
        return tensor


def stored_tensors(directory: Path, weight_map: Mapping[str, str]) -> Iterator[StoredTensor]:
    """The named tensors, one after the other, file by file. Each can be read until the next one is asked for.

    Raises:
        CheckpointError: If a file is missing or cut short, or does not hold what its index says.
    """
    with CheckpointFolder(directory) as folder:
        for file, names in by_file(weight_map).items():
            held = folder.run(read_header(str(directory), file))
            for name in names:
                yield StoredTensor(folder, file, held_tensor(held, name, str(directory / file)))


def by_file(weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    """The tensors of each file.

    >>> by_file({"w": "one", "n": "two", "b": "one"})
    {'one': ['w', 'b'], 'two': ['n']}
    """
    files: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        files[file].append(name)
    return dict(files)


def held_tensor(held: Mapping[str, FileTensor], name: str, path: str) -> FileTensor:
    """A tensor that an index promises.

    Raises:
        CheckpointError: If the file does not hold it.
    """
    if name not in held:
        raise unreadable(path, f"it holds no {name!r}, which its index promises")
    return held[name]


def read_tensors(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors, one after the other, file by file; raises as `stored_tensors`."""
    for tensor in stored_tensors(directory, weight_map):
        yield tensor.name, tensor.read()


def read_shapes(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor, without reading it; raises as `stored_tensors`."""
    for tensor in stored_tensors(directory, weight_map):
        yield tensor.name, tensor.dtype, tensor.shape
