"""``python -m benchmarks.harness.programs.bare NBYTES``: the least that a server of bytes does, to compare a ps with.

It serves each connection at PARAMSERVER_LISTEN_FD with a thread, as a ps does, and carries out requests: to answer, to
send so many bytes of its memory, or to receive them into it. Sockets block, and send at once as a ps's do.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Iterator

from benchmarks.harness.crew import Crew
from paramserver.cluster import environment
from paramserver.launch.spec import HOST
from paramserver.memory.arena_memory import payload_memory

PROGRAM = "benchmarks.harness.programs.bare"

WORD = struct.Struct("<4sxxxxQ")
"""A request or an answer: the action and a number of bytes. It is as long as a small message of ours."""

ECHO, SEND, RECEIVE = b"echo", b"send", b"recv"


class Bare:
    """A client of the bare server.

    Args:
        connection: A connected socket, owned by this object from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._word = memoryview(bytearray(WORD.size))
        _send_at_once(connection)

    def echo(self) -> None:
        """Send a word and wait for its answer."""
        self._ask(ECHO, 0)
        self._await()

    def pull(self, into: memoryview) -> None:
        """Request bytes, and receive them."""
        self._ask(SEND, into.nbytes)
        receive_into(self._connection, into)

    def push(self, view: memoryview) -> None:
        """Send bytes, and wait until they have been received."""
        self._ask(RECEIVE, view.nbytes)
        self._connection.sendall(view)
        self._await()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    def _ask(self, what: bytes, nbytes: int) -> None:
        self._connection.sendall(WORD.pack(what, nbytes))

    def _await(self) -> None:
        receive_into(self._connection, self._word)


def receive_into(connection: socket.socket, view: memoryview) -> bool:
    """Fill ``view``, and return False if the stream ends before."""
    received = 0
    while received < view.nbytes:
        count = connection.recv_into(view[received:], 0, socket.MSG_WAITALL)
        if not count:
            return False
        received += count
    return True


class BareServer:
    """A bare server in a process of its own; see the module.

    Args:
        crew: Starts the process.
        family: ``AF_INET`` or ``AF_UNIX``.
        nbytes: The largest number of bytes that it sends or receives at a time.
    """

    def __init__(self, crew: Crew, family: socket.AddressFamily, nbytes: int = 0) -> None:
        self._family = family
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((HOST, 0) if family == socket.AF_INET else "")  # "": Linux finds an abstract name
            listener.listen(128)
            self._address = listener.getsockname()
            self.child = crew.start_module("the bare server", PROGRAM, str(nbytes), {}, listener)

    @contextlib.contextmanager
    def client(self) -> Iterator[Bare]:
        """Provide a client for the length of a block."""
        connection = socket.socket(self._family, socket.SOCK_STREAM)
        with contextlib.closing(Bare(connection)) as bare:
            connection.connect(self._address)
            yield bare


def main(descriptor: int | None, nbytes: int) -> None:
    """Serve. Blocks for ever."""
    memory = payload_memory(nbytes).fill_(1).numpy().data  # written, so that its pages are there
    with socket.socket(fileno=descriptor) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection, memory), daemon=True).start()


def _serve(connection: socket.socket, memory: memoryview) -> None:
    _send_at_once(connection)
    word = memoryview(bytearray(WORD.size))
    with connection:
        while receive_into(connection, word):
            what, nbytes = WORD.unpack(word)
            if what == SEND:
                connection.sendall(memory[:nbytes])
                continue
            receive_into(connection, memory[: nbytes if what == RECEIVE else 0])
            connection.sendall(word)


def _send_at_once(connection: socket.socket) -> None:
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


if __name__ == "__main__":
    main(environment.read().listen_fd, int(sys.argv[1]))
