"""Complaints about peers, at most one line a minute for each kind of fault.

Rules
    * The first fault of a kind is told at once. Further ones are counted, and their number is told with the next line
      about this kind, a minute later at the earliest.
    * At most `MAX_KINDS` kinds are kept; all others count as one. So no peer can fill a log or the memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL = 60.0
"""Seconds between two lines about faults of the same kind."""
MAX_KINDS = 64


@dataclass
class _Kind:
    told_at: float
    untold: int = 0


class Complaints:
    """Writes lines about faults of peers. Thread-safe.

    Args:
        tell: Writes one line.
        clock: Returns the time in seconds.

    Example:
        >>> now = 0.0
        >>> complaints = Complaints(print, lambda: now)
        >>> for now in (0.0, 1.0, 2.0, 61.0):
        ...     complaints.add("token", f"a wrong token at {now:g} s")
        a wrong token at 0 s
        a wrong token at 61 s (and 2 more like this since the last line about it)
    """

    def __init__(self, tell: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}
        self._lock = threading.Lock()

    def add(self, kind: str, message: str) -> None:
        """Tell a fault, or count it if one of its kind was told within the last minute."""
        with self._lock:
            line = self._line(kind if len(self._kinds) < MAX_KINDS or kind in self._kinds else "others", message)
        if line:
            self._tell(line)

    def _line(self, name: str, message: str) -> str:
        now, kind = self._clock(), self._kinds.get(name)
        if kind and now < kind.told_at + INTERVAL:
            kind.untold += 1
            return ""
        self._kinds[name] = _Kind(now)
        untold = kind.untold if kind else 0
        return f"{message} (and {untold} more like this since the last line about it)" if untold else message
