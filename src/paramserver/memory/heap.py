"""Freed memory that the process still holds."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import numpy as np

LARGEST = (32 << 20) - (64 << 10)
"""Size in bytes of the largest block that stays on the heap: glibc maps larger blocks anew each time."""


def give_back() -> None:
    """Give freed memory back to the system. Takes milliseconds.

    The C library keeps freed memory between blocks that are in use: after a model of many small parameters has moved,
    all of their old memory. Only glibc is known to keep it, and to have a call that releases it.
    """
    if sys.platform == "linux":  # Windows does not even have a C library of this process's own
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def keep_for_steps() -> None:
    """Keep memory that a step frees for the next step, up to 64 MB at the end of the heap. Takes microseconds.

    glibc gives the end of the heap back when more is free there than twice the largest block that the process has ever
    freed, with a limit of 32 MB for this block. After freeing such a block once, the process no longer gets new pages
    in each step for its activations. This function frees one; the block itself is never touched.
    """
    np.empty(LARGEST, dtype=np.uint8)
