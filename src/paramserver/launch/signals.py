"""The signals that a launcher handles, as bytes on a socket that its loop waits for."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end the run."""
PASSED_ON = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals for the tasks that have a handler for them."""


@contextlib.contextmanager
def caught_signals() -> Iterator[socket.socket]:
    """Provide a socket that receives one byte, the signal's number, for each signal that the launcher handles."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        old_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # The handler does nothing, but Python writes the byte only for signals that have a handler. A signal that is
        # ignored, as SIGHUP is under nohup, stays so.
        handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in {*ENDING, *PASSED_ON}
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield reader
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_descriptor)
