"""Memory in huge pages, in which a processor finds the rows of a large table with less to look up.

It remembers where some 2,000 pages lie, which are 8 MB of ordinary ones. For a row elsewhere it first reads up to four
entries of the system's page tables, and in a virtual machine those of the host for each of them.

Everything here is at best: where the system has no huge pages, or none to spare, memory has ordinary ones.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import warnings

import numpy as np
import torch
from torch import Tensor

SIZE = 2 << 20
"""Bytes of a huge page on x86-64, and on arm64 with ordinary ones of 4 KB."""

_MAP_FIXED = 0x10  # <linux/mman.h>; the mmap module names neither
_MADV_COLLAPSE = 25


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.zeros`; memory is taken when it is first written, on the CPU a huge page at a time if it is as large.

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
    """The first bytes of a file, flat uint8, shared with others; where it has huge pages they are mapped as such.

    It is mapped as long as the tensor lives. Linux only.

    Raises:
        OSError: If the file cannot be mapped.
    """
    data = _reserved(nbytes, mmap.PROT_READ)  # which does not count as memory that may be written to
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if _libc().mmap(data.data_ptr(), nbytes, protection, flags, descriptor, 0) != data.data_ptr():
        raise OSError(number := ctypes.get_errno(), os.strerror(number))
    return data


def take(data: Tensor) -> None:
    """Have the memory of a file come at once and in huge pages, which takes a fraction of the time of ordinary ones.

    The system makes them from Linux 6.1 on, whatever its settings say of shared memory, unless they forbid it.

    Args:
        data: All of it, from `map_file`, writable; still zeros.
    """
    data[: data.nbytes // SIZE * SIZE : SIZE] = 0  # where there is no page at all, none is made
    _advise(data, _MADV_COLLAPSE)


def _reserved(nbytes: int, protection: int) -> Tensor:
    """Addresses from a multiple of `SIZE` on, which belong to nothing else as long as the tensor lives; zeros."""
    mapping = mmap.mmap(-1, nbytes + SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection)
    first = -np.frombuffer(mapping, np.uint8).ctypes.data % SIZE
    with warnings.catch_warnings():
        # torch warns that a read-only buffer must not be written to; whoever maps one for reading does not
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=first)


def _advise(data: Tensor, advice: int) -> None:
    """Tell the system about the whole huge pages of memory; it may not follow. Other threads go on meanwhile."""
    _libc().madvise(data.data_ptr(), data.nbytes // SIZE * SIZE, advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
