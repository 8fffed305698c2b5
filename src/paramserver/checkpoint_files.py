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

import contextlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paramserver.arena import Range, tensor_bytes
from paramserver.errors import CheckpointError

VALUES_INDEX = "model.safetensors.index.json"
SLOTS_INDEX = "optimizer.safetensors.index.json"

_METADATA = {"format": "pt"}
_LENGTH_BYTES = 8

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = {code: name for name, code in _CODES.items()}


# --- indexes -----------------------------------------------------------------------------------------------------


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


# --- writing -----------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What one task holds of a tensor whose rows several write.

    Attributes:
        shape: The shape of the whole tensor.
        start: The first row that is here.
        values: The rows that are here, contiguous; perhaps none.
    """

    shape: tuple[int, ...]
    start: int
    values: torch.Tensor


def rows_files(variable: str) -> tuple[str, str]:
    """The names of the files for the values and the slots of a variable whose rows several write.

    >>> rows_files("tables/users-00001")
    ('model-tables%2Fusers%2D00001.safetensors', 'optimizer-tables%2Fusers%2D00001.safetensors')
    """
    # Without a hyphen it cannot be the name of a shard's file, such as model-00001-of-00002.
    quoted = quote(variable, safe="").replace("-", "%2D")
    return f"model-{quoted}.safetensors", f"optimizer-{quoted}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write whole tensors into a file of their own; no file if there are none.

    Raises:
        CheckpointError: If it cannot be written.
    """
    if tensors:
        with _writing(path):
            save_file(dict(tensors), path, metadata=_METADATA)
            with path.open("rb") as written:
                os.fsync(written.fileno())


def write_rows(path: Path, tensors: Mapping[str, Rows]) -> None:
    """Write some rows of tensors into a file, into which other tasks write the others: before, meanwhile or after.

    All of them must name the same tensors of the same dtypes and shapes. Idempotent. Rows that nobody writes are zero.

    Raises:
        CheckpointError: If it cannot be written.
    """
    header, offsets, size = _layout(tensors)
    with _writing(path), _opened(path) as file:
        os.ftruncate(file, size)
        _write_at(file, 0, memoryview(header))
        for name, (shape, start, values) in tensors.items():
            row_bytes = math.prod(shape[1:]) * values.element_size()
            _write_at(file, offsets[name] + start * row_bytes, tensor_bytes(values.reshape(-1).cpu()))
        os.fsync(file)


def _layout(tensors: Mapping[str, Rows]) -> tuple[bytes, dict[str, int], int]:
    """The header of a file of whole tensors, where in the file each of them begins, and the size of the file."""
    entries: dict[str, object] = {"__metadata__": _METADATA}
    begins: dict[str, int] = {}
    end = 0
    # The wider dtypes first, so that each tensor is aligned for its own; the file's readers want no gaps.
    for name in sorted(tensors, key=lambda name: (-tensors[name].values.element_size(), name)):
        shape, _, values = tensors[name]
        begin, end = end, end + math.prod(shape) * values.element_size()
        dtype = _CODES[str(values.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begins[name] = begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    # O_DSYNC, because an NFS client may else write whole pages, and with them zeros over the rows of another ps.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DSYNC, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file: int, offset: int, content: memoryview) -> None:
    while content:
        count = os.pwrite(file, content, offset)  # no more than 2 GiB at once
        content, offset = content[count:], offset + count


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing the checkpoint file {path} failed: {error}; does every ps see model_dir, and may it write there?",
            str(path),
        ) from error


# --- reading -----------------------------------------------------------------------------------------------------


class StoredTensor:
    """A tensor in an open file: its dtype and shape are known, and any of its rows can be read.

    Attributes:
        name: Its name.
        dtype: The name of its dtype.
        shape: The shape of all of it.
    """

    def __init__(self, path: Path, file: Any, name: str) -> None:
        self._path, self._file = path, file
        self._slice = file.get_slice(name)
        self.name = name
        self.dtype = _NAMES.get(self._slice.get_dtype(), self._slice.get_dtype())
        self.shape = tuple(self._slice.get_shape())

    def read(self, rows: Range | None = None) -> torch.Tensor:
        """The rows ``[start, stop)`` of it; all of it without them, and where it is a scalar.

        Raises:
            CheckpointError: If they cannot be read.
        """
        with _reading(self._path):
            if rows is None or not self.shape:
                return self._file.get_tensor(self.name)  # type: ignore[no-any-return]
            return self._slice[rows[0] : rows[1]]  # type: ignore[no-any-return]


def stored_tensors(directory: Path, weight_map: Mapping[str, str]) -> Iterator[StoredTensor]:
    """The named tensors, one after the other, file by file. Each can be read until the next one is asked for.

    Raises:
        CheckpointError: If a file is missing or cut short, or does not hold what its index says.
    """
    files: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        files[file].append(name)
    for file, names in files.items():
        path = directory / file
        with _reading(path), safe_open(path, "pt") as opened:
            for name in names:
                yield StoredTensor(path, opened, name)


def read_tensors(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors, one after the other, file by file; raises as `stored_tensors`."""
    for tensor in stored_tensors(directory, weight_map):
        yield tensor.name, tensor.read()


def read_shapes(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor, without reading it; raises as `stored_tensors`."""
    for tensor in stored_tensors(directory, weight_map):
        yield tensor.name, tensor.dtype, tensor.shape


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read: {error}; was it cut short?", str(path)
        ) from error
