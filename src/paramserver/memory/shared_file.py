"""Anonymous files that processes on one host share.

A shared file (Linux memfd) has no name in any file system: when the last process that holds it is gone, for any reason,
the memory is gone too. Seals make it safe to share: its size is fixed, so that a peer cannot take memory away from
under a reader, and only its creator can write to it.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Iterator

import torch

from paramserver.errors import RemoteProtocolError
from paramserver.memory import huge_pages

if sys.platform == "linux":  # elsewhere `can_share` is false, and Windows has no such module
    import fcntl

F_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>; the fcntl module does not name it


@functools.cache
def can_share() -> bool:
    """Return whether this platform has anonymous shared files that can be sealed, found out by making one."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return False
    try:
        SharedFile.create(0).close()
    except OSError:  # an old kernel, or a sandbox
        return False
    return True


class SharedFile:
    """An anonymous file that is mapped into this process.

    `close`, or the collection of this object, closes its descriptor; the mapping lives as long as a tensor of it.

    Attributes:
        data: The bytes of the file as a flat uint8 tensor. A process that attached the file must not write to it; the
            processor would raise a fault.
    """

    def __init__(self, descriptor: int, data: torch.Tensor) -> None:
        self.data = data
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, nbytes: int, *, is_filled: bool = False) -> SharedFile:
        """Create a file of at least ``nbytes`` zero bytes, which others can map only for reading.

        Args:
            nbytes: Number of bytes.
            is_filled: Whether all of the file will be written, and not only parts, so that its memory is taken at once.

        Raises:
            OSError: If the system cannot provide that much memory, or has no such files.
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
        """Map the file of another process for reading. The new object owns the descriptor from now on.

        Raises:
            RemoteProtocolError: If the file is smaller than agreed, could be shrunk by its owner under a reader, or
                cannot be mapped.
        """
        with _closed_on_error(descriptor):
            try:
                _check_sealed(descriptor, nbytes, owner)
                data = huge_pages.map_file(descriptor, _mapped_bytes(nbytes), mmap.PROT_READ)
            except OSError as error:
                raise RemoteProtocolError(f"{owner} passed a file that is not a shared memory: {error}") from error
        return cls(descriptor, data)

    def fileno(self) -> int:
        """Return the descriptor, for passing it to another process."""
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


def _mapped_bytes(nbytes: int) -> int:
    return max(nbytes, mmap.PAGESIZE)  # an empty mapping is not possible
