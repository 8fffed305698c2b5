"""Reading the tensors of a checkpoint by name: whole, or some rows at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from paramserver.checkpoint.folder import CheckpointFolder, Read, read_header
from paramserver.checkpoint.tensor_file import FileTensor, unreadable
from paramserver.layout.blocks import Range
from paramserver.layout.variables import DTYPES
from paramserver.memory.arena_memory import tensor_bytes


class StoredTensor:
    """A tensor in an open folder: its dtype and shape are known, and any of its rows can be read.

    Attributes:
        name: Its name.
        dtype: The name of its dtype.
        shape: The shape of the whole tensor.
    """

    def __init__(self, folder: CheckpointFolder, file: str, tensor: FileTensor) -> None:
        self._folder, self._file, self._begin = folder, file, tensor.begin
        self.name = tensor.name
        self.dtype, self.shape = tensor.spec

    def read(self, rows: Range | None = None) -> torch.Tensor:
        """Read the rows ``[start, stop)``, or the whole tensor without ``rows`` or if it is a scalar.

        Raises:
            CheckpointError: If the rows cannot be read.
        """
        start, stop = rows if rows is not None and self.shape else (0, self.shape[0] if self.shape else 1)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        tensor = torch.empty(shape, dtype=DTYPES[self.dtype], device="cpu")
        out = tensor_bytes(tensor.view(-1))
        offset = self._begin + start * (out.nbytes // max(stop - start, 1))
        self._folder.carry_out(Read(self._file, offset, out))
        return tensor


def stored_tensors(directory: Path, weight_map: Mapping[str, str]) -> Iterator[StoredTensor]:
    """Yield the named tensors one after the other, file by file. Each can be read until the next one is asked for.

    Raises:
        CheckpointError: If a file is missing or cut short, or does not hold a tensor that its index names.
    """
    with CheckpointFolder(directory) as folder:
        for file, names in by_file(weight_map).items():
            held = folder.run(read_header(str(directory), file))
            for name in names:
                yield StoredTensor(folder, file, held_tensor(held, name, str(directory / file)))


def by_file(weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    """Group the names of tensors by file.

    >>> by_file({"w": "one", "n": "two", "b": "one"})
    {'one': ['w', 'b'], 'two': ['n']}
    """
    files: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        files[file].append(name)
    return dict(files)


def held_tensor(held: Mapping[str, FileTensor], name: str, path: str) -> FileTensor:
    """Return a tensor that an index names.

    Raises:
        CheckpointError: If the file does not hold it.
    """
    if name not in held:
        raise unreadable(path, f"it holds no {name!r}, which its index promises")
    return held[name]


def read_tensors(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors one after the other, file by file; raises as `stored_tensors`."""
    for tensor in stored_tensors(directory, weight_map):
        yield tensor.name, tensor.read()


def read_shapes(directory: Path, weight_map: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of each tensor without reading it; raises as `stored_tensors`."""
    for tensor in stored_tensors(directory, weight_map):
        yield tensor.name, tensor.dtype, tensor.shape
