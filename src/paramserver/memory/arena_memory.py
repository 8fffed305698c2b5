"""Memory for arenas: private to a process, or in a file that processes on one host share.

Worker and ps compute the place of an arena in a shared file from the same layouts.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from paramserver.layout.arena import ALIGNMENT, ArenaLayout
from paramserver.layout.blocks import ID_BYTES, num_blocks
from paramserver.memory import huge_pages
from paramserver.memory.shared_file import SharedFile, can_share

_VERSION_BYTES = 8


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Return its descriptor."""


@dataclass(frozen=True)
class StoreMemory:
    """The memory of a ps for the values of its arenas.

    Attributes:
        values: A flat tensor for each arena.
        versions: For each arena, a counter for each block: odd while the block is written, and higher by two
            afterwards.
        file: The file that other processes can map, if there is one; it stays open for as long as this object lives.
    """

    values: list[torch.Tensor]
    versions: list[npt.NDArray[np.uint64]]
    file: HasFileno | None = None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, for sending or receiving."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def payload_memory(nbytes: int) -> torch.Tensor:
    """Return private memory for a socket's payloads: flat uint8, not initialized, starting in the middle of a page.

    On AMD's Zen 3 the kernel copies five times slower to a place that is 1 to 31 bytes further into its page than the
    source is into its own. In a socket's pages, a payload starts as far into a page as its message is long, which is
    close to where malloc's memory often starts.
    """
    memory = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8)
    first = (mmap.PAGESIZE // 2 - memory.data_ptr()) % mmap.PAGESIZE
    return memory[first : first + nbytes]


def gradient_bytes(layouts: Sequence[ArenaLayout]) -> int:
    """Return the size of the file for a worker's gradients."""
    return _place([layout.on_worker for layout in layouts], start=0)[1]


def gradient_tensors(layouts: Sequence[ArenaLayout], data: torch.Tensor) -> list[torch.Tensor]:
    """Return a flat tensor for each arena, in a file of `gradient_bytes`."""
    return _carve([layout.on_worker for layout in layouts], data, start=0)


def rows_bytes(layouts: Sequence[ArenaLayout]) -> int:
    """Return the size of the file for the rows that a worker pushes: all rows of its tables, and their ids.

    Pages of the file that no push has reached take no memory.
    """
    tables = [layout for layout in layouts if layout.is_table]
    return sum(_aligned(ID_BYTES * layout.table_shape[0]) + _aligned(layout.nbytes) for layout in tables)


class RowsFile:
    """A file of `rows_bytes` with the rows of one push, one after the other; both ends compute the same places.

    Args:
        data: The bytes of the file.
    """

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data = data
        self._end = 0

    def rewind(self) -> None:
        """Begin with the rows of another push."""
        self._end = 0

    def next(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return the memory for the next bytes.

        Raises:
            ValueError: If they do not fit.
        """
        start, stop = self._end, self._end + nbytes
        if not start <= stop <= len(self._data):
            raise ValueError(f"{nbytes} bytes of rows from byte {start}, of {len(self._data)} that are shared")
        self._end = _aligned(stop)
        return self._data[start:stop]


def store_bytes(layouts: Sequence[ArenaLayout]) -> int:
    """Return the size of the file for a ps's values, including the versions of their blocks."""
    return _place(layouts, start=_versions_bytes(layouts))[1]


def store_memory(layouts: Sequence[ArenaLayout], file: SharedFile) -> StoreMemory:
    """Return values and versions of the arenas of a ps, in ``file``."""
    counters = file.data.numpy()[: _versions_bytes(layouts)].view(np.uint64)
    versions, first = [], 0
    for layout in layouts:
        versions.append(counters[first : first + num_blocks(layout.size)])
        first += num_blocks(layout.size)
    return StoreMemory(_carve(layouts, file.data, start=_versions_bytes(layouts)), versions, file)


def shared_store_memory(layouts: Sequence[ArenaLayout]) -> StoreMemory:
    """Return store memory in a new file, which workers on this host can map; private memory if this is not possible."""
    if not can_share():
        return private_store_memory(layouts)
    return store_memory(layouts, SharedFile.create(store_bytes(layouts), is_filled=True))


def private_store_memory(layouts: Sequence[ArenaLayout], device: torch.device | str = "cpu") -> StoreMemory:
    """Return store memory of this process, on one of its devices.

    Each arena is a tensor of its own, so that a program can save parameters, which are views into it.
    """
    return StoreMemory(
        [huge_pages.zeros((layout.size,), layout.torch_dtype, device) for layout in layouts],
        [np.zeros(num_blocks(layout.size), dtype=np.uint64) for layout in layouts],
    )


def _versions_bytes(layouts: Sequence[ArenaLayout]) -> int:
    return _aligned(_VERSION_BYTES * sum(num_blocks(layout.size) for layout in layouts))


def _carve(layouts: Sequence[ArenaLayout], data: torch.Tensor, start: int) -> list[torch.Tensor]:
    offsets, _ = _place(layouts, start)
    return [
        data[offset : offset + layout.nbytes].view(layout.torch_dtype)
        for offset, layout in zip(offsets, layouts, strict=True)
    ]


def _place(layouts: Sequence[ArenaLayout], start: int) -> tuple[list[int], int]:
    offsets = []
    for layout in layouts:
        offsets.append(start)
        start = _aligned(start + layout.nbytes)
    return offsets, start


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
