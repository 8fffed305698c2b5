"""Memory that was freed and that the process holds nevertheless."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Give freed memory back to the system. Takes milliseconds.

    The C library keeps what lies between memory that is in use: after a model of many small parameters has moved, all
    of their old memory. Only glibc is known to do so, and to be able to let go of it.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
