"""How long tests wait for what takes a moment, on a machine that has others to serve."""

from __future__ import annotations

import functools
import time

MARGIN = 4.0
"""How much longer anything may take than on a quiet machine; a limit is reached only where something hangs."""
SPIN = 0.02
"""Seconds of a core that are asked for, to see how long they take."""


def patience(seconds: float) -> float:
    """Return the limit for something that takes ``seconds`` at most on a quiet machine."""
    return seconds * MARGIN * _slowness()


@functools.cache
def _slowness() -> float:
    """Seconds for each second of a core that this process gets, as the machine was when tests began."""
    begun, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < SPIN:
        pass
    return max((time.perf_counter() - begun) / SPIN, 1.0)
