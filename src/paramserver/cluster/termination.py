"""SIGTERM as an exception: the program ends as with ``sys.exit``, so that ``finally`` blocks and exit handlers run."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from types import FrameType
from typing import Self

from paramserver.cluster.exit_codes import TERMINATED

AGAIN = 0.01
"""Seconds after which a SIGTERM that had no effect is sent again; twice as long each time."""


class Termination:
    """A handler for SIGTERM while it is entered: the first one raises SystemExit, a second one kills. Main thread only.

    Attributes:
        is_over: Whether only exit handlers are left to run, so that there is nothing to end.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._owner = os.getpid()
        self._exit: SystemExit | None = None
        self._is_dropping = False
        self._num_drops = 0

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._old_hook
        if self._exit is None:  # otherwise the next SIGTERM kills, until the program has ended
            signal.signal(signal.SIGTERM, self._old_handler)

    def install(self) -> None:
        """Handle SIGTERM from now on; for the rest of the process, if `__exit__` is not called."""
        self._old_handler = signal.signal(signal.SIGTERM, self._terminate)
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._drop

    def has_caused(self, exc: BaseException | None) -> bool:
        """Return whether SIGTERM has caused an exception, perhaps indirectly, as when C++ code imports a module."""
        while exc is not None and exc is not self._exit:
            exc = exc.__cause__ or exc.__context__
        return exc is not None

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._is_dropping:
            self._send_again()  # an exception would be dropped here, too
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self._owner:
            # A process that the program has forked, such as a worker of a DataLoader, inherits this handler, but its
            # parent expects the signal to kill it.
            os.kill(os.getpid(), signal.SIGTERM)
        if not self.is_over:
            self._exit = SystemExit(TERMINATED)
            raise self._exit

    def _drop(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send SIGTERM again later, if it came where Python drops exceptions, such as in a ``__del__``."""
        if self._exit is None or unraisable.exc_value is not self._exit:
            self._old_hook(unraisable)
            return
        self._is_dropping = True
        signal.signal(signal.SIGTERM, self._terminate)
        self._send_again()
        self._is_dropping = False  # the last statement: no signal is handled between it and the return

    def _send_again(self) -> None:
        # Ever later, or a slow machine might never get out of a hook.
        pause, self._num_drops = math.ldexp(AGAIN, self._num_drops), self._num_drops + 1
        thread = threading.Timer(pause, os.kill, (self._owner, signal.SIGTERM))
        thread.daemon = True
        thread.start()
