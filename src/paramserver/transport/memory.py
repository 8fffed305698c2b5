"""Memory for arenas: private to a process, or an anonymous file that processes of one host share.

A shared file (Linux memfd) has no name in any file system: when the last process that holds it is gone, however it
went, the memory is gone too. Seals make it safe to share: its size is fixed, so that a peer cannot take memory away
from under a reader, and nobody but its creator can write to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from paramserver import huge_pages
from paramserver.arena import ALIGNMENT, ID_BYTES, ArenaLayout, StoreMemory, num_blocks
from paramserver.errors import RemoteProtocolError

F_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>; the fcntl module does not name it
_VERSION_BYTES = 8


@functools.cache
def can_share() -> bool:
    """Whether this platform has anonymous shared files that can be sealed; found out by making one."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return False
    try:
        SharedFile.create(0).close()
    except OSError:  # an old kernel, or a sandbox
        return False
    return True


class SharedFile:
    """An anonymous file that is mapped into this process.

    Its descriptor is closed by `close`, or when this object is collected; the mapping lives as long as a tensor of it.

    Attributes:
        data: Its bytes as a flat uint8 tensor. Writing to it in a process that attached it is a fault.
    """

    def __init__(self, descriptor: int, data: torch.Tensor) -> None:
        self.data = data
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, nbytes: int, *, is_filled: bool = False) -> SharedFile:
        """A new file of at least ``nbytes`` bytes, zeroed, that others can map for reading only.

        Args:
            nbytes: How many.
            is_filled: Whether all of it will be written, and not only some, so that it takes its memory at once.

        Raises:
            OSError: If the system cannot give that much, or has no such files.
        """
        descriptor = os.memfd_create("paramserver", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with _closed_on_error(descriptor):
            os.ftruncate(descriptor, _mapped_bytes(nbytes))
            data = huge_pages.map_file(descriptor, _mapped_bytes(nbytes), mmap.PROT_READ | mmap.PROT_WRITE)
            if is_filled:
                huge_pages.take(data)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE)
        return cls(descriptor, data)

    @classmethod
    def attach(cls, descriptor: int, nbytes: int, owner: str) -> SharedFile:
        """Another process's file, for reading. The descriptor is owned by the new object from now on.

        Raises:
            RemoteProtocolError: If it is smaller than agreed, its owner could shrink it under a reader, or it is
                no file that can be mapped.
        """
        with _closed_on_error(descriptor):
            try:
                _check_sealed(descriptor, nbytes, owner)
                data = huge_pages.map_file(descriptor, _mapped_bytes(nbytes), mmap.PROT_READ)
            except OSError as error:
                raise RemoteProtocolError(f"{owner} passed a file that is no shared memory: {error}") from error
        return cls(descriptor, data)

    def fileno(self) -> int:
        """The descriptor, to be passed to another process."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor; the mapping lives as long as a tensor of it does. Idempotent."""
        self._close()


@contextlib.contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _check_sealed(descriptor: int, nbytes: int, owner: str) -> None:
    size = os.fstat(descriptor).st_size
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if size < _mapped_bytes(nbytes) or not seals & fcntl.F_SEAL_SHRINK:
        raise RemoteProtocolError(
            f"{owner} shared a memory of {size} bytes with seals {seals:#x}; "
            f"expected at least {_mapped_bytes(nbytes)} bytes, sealed against shrinking"
        )


def payload_memory(nbytes: int) -> torch.Tensor:
    """Private memory for what a socket sends or receives: flat uint8, not initialised, from the middle of a page on.

    On AMD's Zen 3 the kernel copies five times slower to a place that is 1 to 31 bytes further into its page than the
    source is into its own. In a socket's pages a payload lies as far in as the message before it is long, which is
    about as far as malloc's memory often does.
    """
    memory = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8)
    first = (mmap.PAGESIZE // 2 - memory.data_ptr()) % mmap.PAGESIZE
    return memory[first : first + nbytes]


def _mapped_bytes(nbytes: int) -> int:
    return max(nbytes, mmap.PAGESIZE)  # nothing cannot be mapped


def gradient_bytes(layouts: Sequence[ArenaLayout]) -> int:
    """How large the file of a worker's gradients is."""
    return _place([layout.on_worker for layout in layouts], start=0)[1]


def gradient_tensors(layouts: Sequence[ArenaLayout], data: torch.Tensor) -> list[torch.Tensor]:
    """A flat tensor for each arena, in a file of `gradient_bytes`."""
    return _carve([layout.on_worker for layout in layouts], data, start=0)


def rows_bytes(layouts: Sequence[ArenaLayout]) -> int:
    """How large the file of the rows is that a worker pushes: for all rows of its tables, and their ids.

    Pages of it that no push has reached take no memory.
    """
    tables = [layout for layout in layouts if layout.is_table]
    return sum(_aligned(ID_BYTES * layout.table_shape[0]) + _aligned(layout.nbytes) for layout in tables)


class RowsFile:
    """A file of `rows_bytes`, in which the rows of one push lie one after the other; both ends count alike.

    Args:
        data: Its bytes.
    """

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data = data
        self._end = 0

    def rewind(self) -> None:
        """Begin with the rows of another push."""
        self._end = 0

    def next(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Where the next bytes lie.

        Raises:
            ValueError: If there is no such place.
        """
        start, stop = self._end, self._end + nbytes
        if not start <= stop <= len(self._data):
            raise ValueError(f"{nbytes} bytes of rows from byte {start}, of {len(self._data)} that are shared")
        self._end = _aligned(stop)
        return self._data[start:stop]


def store_bytes(layouts: Sequence[ArenaLayout]) -> int:
    """How large the file of a ps's values is, the versions of their blocks included."""
    return _place(layouts, start=_versions_bytes(layouts))[1]


def store_memory(layouts: Sequence[ArenaLayout], file: SharedFile) -> StoreMemory:
    """Values and versions of the arenas of a ps, in ``file``."""
    counters = file.data.numpy()[: _versions_bytes(layouts)].view(np.uint64)
    versions, first = [], 0
    for layout in layouts:
        versions.append(counters[first : first + num_blocks(layout.size)])
        first += num_blocks(layout.size)
    return StoreMemory(_carve(layouts, file.data, start=_versions_bytes(layouts)), versions, file)


def shared_store_memory(layouts: Sequence[ArenaLayout]) -> StoreMemory:
    """The same in a new file, which workers of this host can map; in private memory where there are no such files."""
    if not can_share():
        return private_store_memory(layouts)
    return store_memory(layouts, SharedFile.create(store_bytes(layouts), is_filled=True))


def private_store_memory(layouts: Sequence[ArenaLayout], device: torch.device | str = "cpu") -> StoreMemory:
    """The same in memory of this process, on a device of it.

    Each arena is a tensor of its own, so that a program can save the values that are views into it.
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
