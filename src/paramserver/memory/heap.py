"""Memory that was freed and that the process holds nevertheless."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np

LARGEST = (32 << 20) - (64 << 10)
"""Bytes. glibc maps whatever is larger anew each time."""


def give_back() -> None:
    """Give freed memory back to the system. Takes milliseconds.

    The C library keeps what lies between memory that is in use: after a model of many small parameters has moved, all
    of their old memory. Only glibc is known to do so, and to be able to let go of it.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_for_steps() -> None:
    """Keep what a step frees for the next one, up to 64 MB at the end of the heap. Takes microseconds.

    glibc gives the end back when twice as much is free there as the largest block was that the process has ever freed,
    and takes it for a block of 32 MB at most. So a program that has freed such a block once gets no new pages in each
    step for its activations, and this makes it one; the block itself is never touched.
    """
    np.empty(LARGEST, dtype=np.uint8)
