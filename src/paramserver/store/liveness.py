"""The signs of life of workers. No thread and no clock of its own.

A worker sends them on a connection that serves nothing else, so that neither a long computation nor a long request
delays them. A process that is stopped, or a network that loses everything, sends none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Silent(NamedTuple):
    """A worker that has given no sign of life for too long.

    Attributes:
        task: The worker.
        incarnation: Its incarnation.
        timeout: The time limit in seconds.
    """

    task: str
    incarnation: str
    timeout: float


@dataclass
class _Pulse:
    task: str
    timeout: float
    last: float
    source: object


class Liveness:
    """The last sign of life of each incarnation. Thread-safe.

    Args:
        clock: Returns seconds that never decrease.

    >>> times = iter([0.0, 20.0, 40.0, 51.0])
    >>> liveness = Liveness(clock=lambda: next(times))
    >>> liveness.beat("worker:0", "one", 30.0, source=None)
    >>> liveness.beat("worker:0", "one", 30.0, source=None)
    >>> liveness.take_silent(), liveness.take_silent()
    ([], [Silent(task='worker:0', incarnation='one', timeout=30.0)])
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pulses: dict[str, _Pulse] = {}

    def beat(self, task: str, incarnation: str, timeout: float, source: object) -> None:
        """Note a sign of life from a connection; the next one is due within ``timeout`` seconds."""
        with self._lock:
            self._pulses[incarnation] = _Pulse(task, timeout, self._clock(), source)

    def forget(self, incarnation: str, source: object) -> None:
        """Expect no more signs of life from a connection that has ended, unless they come from a newer one."""
        with self._lock:
            pulse = self._pulses.get(incarnation)
            if pulse is not None and pulse.source is source:
                del self._pulses[incarnation]

    def take_silent(self) -> list[Silent]:
        """Return the workers that have become silent. Each is returned once."""
        with self._lock:
            now = self._clock()
            silent = [name for name, pulse in self._pulses.items() if now - pulse.last > pulse.timeout]
            pulses = [(name, self._pulses.pop(name)) for name in silent]
        return [Silent(pulse.task, name, pulse.timeout) for name, pulse in pulses]
