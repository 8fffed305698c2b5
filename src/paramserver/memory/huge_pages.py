"""Memory in huge pages, with which a processor finds the rows of a large table faster.

A processor caches the addresses of some 2,000 pages: 8 MB with ordinary pages. For a row elsewhere, it first reads up
to four entries of the system's page tables, and in a virtual machine those of the host for each of them.

All functions make a best effort: if the system has no huge pages, or none to spare, memory gets ordinary ones.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

SIZE = 2 << 20
"""Size of a huge page in bytes, on x86-64 and on arm64 with ordinary pages of 4 KB."""

TAKERS = 4
"""Threads that take the memory of one file: the system clears pages, and moves others out of the way."""

_MAP_FIXED = 0x10  # <linux/mman.h>; the mmap module names neither
_MADV_COLLAPSE = 25


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return zeros, as `torch.zeros` does, whose memory is taken when it is first written.

    On the CPU, memory of at least the size of a huge page is taken a huge page at a time.

    Example:
        >>> zeros((2, 3), torch.float32)
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < SIZE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    data = _reserved(nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
    _advise(data, mmap.MADV_HUGEPAGE)
    return data.view(dtype).view(shape)


def map_file(descriptor: int, nbytes: int, protection: int) -> Tensor:
    """Map the first bytes of a file as flat uint8 memory shared with others, in huge pages where the file has them.

    The file stays mapped as long as the tensor lives. Linux only.

    Raises:
        OSError: If the file cannot be mapped.
    """
    data = _reserved(nbytes, mmap.PROT_READ)  # read-only, so it does not count as memory that may be written to
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if _libc().mmap(data.data_ptr(), nbytes, protection, flags, descriptor, 0) != data.data_ptr():
        raise OSError(number := ctypes.get_errno(), os.strerror(number))
    return data


def take(data: Tensor) -> None:
    """Take the memory of a file at once and in huge pages, in a fraction of the time that ordinary pages need.

    Linux makes huge pages here from 6.1 on, even if its settings do not ask for them in shared memory, but not if they
    forbid them.

    Args:
        data: All of the file's memory, from `map_file`, writable and still zero.
    """
    count = data.nbytes // SIZE
    data[: count * SIZE : SIZE] = 0  # needs one page in each: without any page, no huge page is made
    parts = torch.split(data[: count * SIZE], max(-(-count // TAKERS), 1) * SIZE)
    with ThreadPoolExecutor(TAKERS, thread_name_prefix="takes memory") as pool:
        list(pool.map(_collapse, parts))


def _collapse(data: Tensor) -> None:
    _advise(data, _MADV_COLLAPSE)


def _reserved(nbytes: int, protection: int) -> Tensor:
    """Reserve zeroed addresses, starting at a multiple of `SIZE`, for as long as the tensor lives."""
    mapping = mmap.mmap(-1, nbytes + SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection)
    first = -np.frombuffer(mapping, np.uint8).ctypes.data % SIZE
    with warnings.catch_warnings():
        # torch warns that a read-only buffer must not be written to; readers of the mapping never write to it
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=first)


def _advise(data: Tensor, advice: int) -> None:
    """Advise the system about the whole huge pages of memory; it may ignore this. Releases the GIL."""
    _libc().madvise(data.data_ptr(), data.nbytes // SIZE * SIZE, advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
