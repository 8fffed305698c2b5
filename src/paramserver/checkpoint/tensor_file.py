"""The safetensors format: the layout of a file of whole tensors. No I/O.

Rules
    * A file is the length of its header (u64, little endian), the header (JSON), and the tensors one after the other.
    * The header depends only on names, dtypes and shapes. So several tasks that each hold some rows of a tensor agree
      on every byte of the file without any message.
    * Wider dtypes come first, so that each tensor is aligned for its dtype: readers allow no gaps between tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from paramserver.errors import CheckpointError
from paramserver.layout.variables import DTYPES

METADATA = {"format": "pt"}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Limit for the size of a header in bytes, as in safetensors itself."""

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


class TensorSpec(NamedTuple):
    """A whole tensor: its dtype, as in ``variables.DTYPES``, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Size of one element in bytes."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Size of all elements in bytes."""
        return math.prod(self.shape) * self.itemsize


class FileLayout(NamedTuple):
    """The layout of a file to be written.

    Attributes:
        header: Bytes at the beginning of the file, including the length.
        begins: Byte at which each tensor begins.
        size: Size of the file in bytes.
    """

    header: bytes
    begins: dict[str, int]
    size: int


def lay_out(tensors: Mapping[str, TensorSpec]) -> FileLayout:
    """Return the layout of a file with these tensors, in the given order within each element size.

    >>> layout = lay_out({"flags": TensorSpec("bool", (3,)), "w": TensorSpec("float32", (2, 2))})
    >>> layout.begins["flags"] - layout.begins["w"], layout.size - layout.begins["flags"]
    (16, 3)
    """
    entries: dict[str, object] = {"__metadata__": METADATA}
    begins: dict[str, int] = {}
    end = 0
    for name, spec in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        begin, end = end, end + spec.nbytes
        entries[name] = {"dtype": _CODES[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
        begins[name] = begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return FileLayout(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)


class FileTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        name: Its name.
        spec: Its dtype and shape.
        begin: Byte of the file at which it begins.
    """

    name: str
    spec: TensorSpec
    begin: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def header_length(first: bytes | bytearray, path: str) -> int:
    """Return the size in bytes of the header that follows the first `LENGTH_BYTES` of a file at ``path``.

    Raises:
        CheckpointError: If no header has this size.
    """
    length = int.from_bytes(first, "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        raise unreadable(path, f"its header would have {length} bytes")
    return length


def parse_header(text: bytes | bytearray, path: str) -> dict[str, FileTensor]:
    """Return the tensors of a file at ``path`` from its header without the length.

    Raises:
        CheckpointError: If the header is malformed, or the size of a tensor does not match its dtype and shape.
    """
    try:
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        return {
            name: _stored(name, msgspec.json.decode(raw, type=_Entry), LENGTH_BYTES + len(text))
            for name, raw in entries.items()
        }
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise unreadable(path, f"its header is malformed: {error}") from error


def unreadable(path: str, reason: object) -> CheckpointError:
    """Return the error for a file with unexpected content."""
    return CheckpointError(f"checkpoint file {path} cannot be read: {reason}; was it cut short?", path)


def _stored(name: str, entry: _Entry, start: int) -> FileTensor:
    if entry.dtype not in _NAMES:
        raise ValueError(f"tensor {name!r} has dtype {entry.dtype}; expected one of {', '.join(_NAMES)}")
    spec = TensorSpec(_NAMES[entry.dtype], entry.shape)
    begin, end = entry.data_offsets
    if min(entry.shape, default=0) < 0 or begin < 0 or end - begin != spec.nbytes:
        raise ValueError(f"tensor {name!r} is {entry.dtype}{list(entry.shape)} in bytes {begin} to {end}")
    return FileTensor(name, spec, start + begin)
