"""A TCP proxy that delays every byte: a long way between two processes, or two hosts."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable

from paramserver.launch.spec import HOST

CHUNK_BYTES = 256 << 10


class Proxy(contextlib.AbstractContextManager["Proxy"]):
    """Passes connections on for the length of a block.

    Args:
        host: The address to listen on.
        port: The port to listen on; 0 for a free one.

    Attributes:
        delay: Seconds by which each byte is delayed, in either direction; may be set at any time.
    """

    def __init__(self, host: str = HOST, port: int = 0) -> None:
        self.delay = 0.0
        self._target = (HOST, 0)
        self._listener = socket.create_server((host, port))
        self._over = threading.Event()
        self._open = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Proxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for connection in self._open:
            _hang_up(connection)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()

    def toward(self, port: int, host: str = HOST) -> str:
        """Pass connections on to this port, by default of this host, and return the address of the proxy."""
        self._target = (host, port)
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is shut down at the end
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    self._go(self._take, source, late)
                    self._go(self._give, late, target)

    def _go(self, what: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=what, args=args)
        self._threads.append(thread)
        thread.start()

    def _take(self, source: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        """Put each chunk into the queue with the time when it is due; an empty one is the end."""
        data = b"some"
        while data:
            try:
                data = source.recv(CHUNK_BYTES)
            except OSError:
                data = b""
            late.put((time.monotonic() + self.delay, data))

    def _give(self, late: queue.SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
        while (item := late.get())[1]:
            due, data = item
            if (wait := due - time.monotonic()) > 0:
                self._over.wait(wait)
            with contextlib.suppress(OSError):  # the receiver may be gone
                target.sendall(data)
        _hang_up(target)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be shut down already
        connection.shutdown(socket.SHUT_RDWR)
