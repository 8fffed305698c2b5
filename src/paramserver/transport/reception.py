"""The reception of a ps: it accepts connections, and lets those in that prove that they belong to the run.

Rules
    * One thread does all this, and waits for all strangers at once: a stranger costs a descriptor and a few kilobytes,
      and no thread.
    * A stranger has `HANDSHAKE_TIMEOUT` seconds for its whole handshake, however many pieces its bytes come in.
    * At most `MAX_STRANGERS` connections that have not proved themselves are open. The next one waits in the queue of
      the operating system until one of them is through. Otherwise the oldest gives up its place, after at least
      `SHORTEST_STAY` seconds. So silent connections keep no worker out, and of many workers that start at once none is
      turned away.
    * No fault of one connection ends the reception. If none can be accepted, for lack of descriptors perhaps, the
      reception stops accepting for `RETRY_INTERVAL` seconds, and goes on with the handshakes under way.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from paramserver.errors import DeadlineError, ParameterServerError, UnavailableError
from paramserver.transport.admission import Admission, Turn, admit
from paramserver.transport.identity import STRANGER, Identity
from paramserver.transport.listener import Listener
from paramserver.wire.messages import Hello

HANDSHAKE_TIMEOUT = 30.0
"""Seconds that a stranger has to prove itself, from its connection on."""
MAX_STRANGERS = 256
"""Limit for the connections that have not proved themselves."""
SHORTEST_STAY = 2.0
"""Seconds for which a stranger keeps its place although others wait for it; a handshake takes milliseconds."""
RETRY_INTERVAL = 1.0
"""Seconds until the next try if a connection cannot be accepted."""

Complain = Callable[[Exception], None]


class Guest(NamedTuple):
    """A connection that has proved itself, and how it has introduced itself."""

    connection: socket.socket
    hello: Hello


class Reception:
    """Does the handshake with every peer that connects. Used by one thread.

    Args:
        listener: Where peers connect.
        me: The identity of the ps.
        complain: Called with the error of each connection that is turned away, and with each error of accepting one: a
            `TokenError`, `RefusedError`, `RemoteProtocolError`, `UnavailableError`, `DeadlineError`, `OSError`, or
            whatever else has failed.
    """

    def __init__(self, listener: Listener, me: Identity, complain: Complain) -> None:
        self._listener = listener
        self._me = me
        self._complain = complain
        self._strangers: dict[_Stranger, None] = {}  # in the order in which they came, a set that keeps it
        self._selector = selectors.PollSelector()  # unlike epoll, it takes no memory of the kernel that may be missing
        self._is_accepting = False
        self._pause_end = 0.0
        self._pause = threading.Event()  # only a pause: there is nothing to wait on

    def guests(self) -> Iterator[Guest]:
        """Yield each connection that has proved itself, which then belongs to the caller, until the listener closes."""
        self._selector.register(self._listener.wake, selectors.EVENT_READ)
        try:
            while not self._listener.is_closed:
                for key in self._ready():
                    if key.data in self._strangers:  # else it has been turned away a moment ago
                        yield from self._go_on(key.data)
                    elif key.fileobj in self._listener.sockets:
                        yield from self._accept(key.fileobj)
        finally:
            for stranger in list(self._strangers):
                self._part(stranger).close()
            self._selector.close()

    def _ready(self) -> list[selectors.SelectorKey]:
        try:
            return [key for key, _ in self._selector.select(self._next_event())]
        except OSError as error:  # no memory is left for the wait itself
            self._complain(error)
            self._pause.wait(RETRY_INTERVAL)
            return []

    def _next_event(self) -> float | None:
        """Do what is due, and return the seconds until something will be due; None if nothing will."""
        now = time.monotonic()
        while (oldest := next(iter(self._strangers), None)) and now >= oldest.since + HANDSHAKE_TIMEOUT:
            self._turn_away(oldest, _too_late(HANDSHAKE_TIMEOUT))
        is_full = len(self._strangers) >= MAX_STRANGERS
        room_at = oldest.since + SHORTEST_STAY if oldest and is_full else 0.0
        accepts_at = max(self._pause_end, room_at)
        self._set_accepting(now >= accepts_at)
        due = [oldest.since + HANDSHAKE_TIMEOUT] if oldest else []
        if not self._is_accepting:
            due.append(accepts_at)
        return max(min(due) - now, 0.0) if due else None

    def _set_accepting(self, wanted: bool) -> None:
        if wanted != self._is_accepting:
            for listening in self._listener.sockets:
                if wanted:
                    self._selector.register(listening, selectors.EVENT_READ)
                else:
                    self._selector.unregister(listening)
            self._is_accepting = wanted

    def _accept(self, listening: socket.socket) -> Iterator[Guest]:
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            if time.monotonic() < oldest.since + SHORTEST_STAY:  # its turn comes after the next look at the clock
                return
            self._turn_away(oldest, _too_late(SHORTEST_STAY, "; others waited for its place"))
        try:
            stranger = _Stranger(listening.accept()[0], self._me, self._listener.local_socket)
        except (BlockingIOError, ConnectionError):  # the peer went away again
            return
        except Exception as error:  # noqa: BLE001  # whatever is missing, a descriptor or memory: it may be there later
            self._complain(error)
            self._pause_end = time.monotonic() + RETRY_INTERVAL
            return
        self._strangers[stranger] = None
        yield from self._go_on(stranger)

    def _go_on(self, stranger: _Stranger) -> Iterator[Guest]:
        try:
            hello = stranger.proceed()
            if hello is None:
                stranger.watch(self._selector)
        except Exception as error:  # noqa: BLE001  # whatever one peer does, the others are received
            self._turn_away(stranger, error)
        else:
            if hello:
                yield Guest(self._part(stranger), hello)

    def _turn_away(self, stranger: _Stranger, error: Exception) -> None:
        self._part(stranger).close()
        self._complain(error)

    def _part(self, stranger: _Stranger) -> socket.socket:
        """Forget a stranger, and return its connection."""
        del self._strangers[stranger]
        stranger.unwatch(self._selector)
        return stranger.connection


class _Stranger:
    """A connection whose handshake is under way.

    Attributes:
        connection: The connection; does not block.
        since: When it was accepted, by the monotonic clock.
    """

    def __init__(self, connection: socket.socket, me: Identity, local_socket: str) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self._admission: Admission = admit(me, local_socket, is_local=connection.family == socket.AF_UNIX)
        self._turn: Turn | None = None
        self._unsent = b""
        self._received = b""
        self._watched_for = 0

    def proceed(self) -> Hello | None:
        """Go as far as that is possible without waiting; return the peer's `Hello` if it has proved itself.

        Raises:
            UnavailableError: If the peer has gone away.
            ParameterServerError: If the peer is turned away; see `admit`.
        """
        try:
            if self._turn is None:
                self.connection.setblocking(False)
                self._begin(next(self._admission))
            while self._exchange():
                self._begin(self._admission.send(self._received))
        except StopIteration as end:
            hello: Hello = end.value
            return hello
        except ParameterServerError:
            raise
        except OSError as error:
            raise UnavailableError(f"{STRANGER} went away: {error.strerror or error}", STRANGER) from error
        return None

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Have the selector say when `proceed` can go on."""
        wanted = selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ
        if not self._watched_for:
            selector.register(self.connection, wanted, self)
        elif wanted != self._watched_for:
            selector.modify(self.connection, wanted, self)
        self._watched_for = wanted

    def unwatch(self, selector: selectors.BaseSelector) -> None:
        """Undo `watch`."""
        if self._watched_for:
            selector.unregister(self.connection)
            self._watched_for = 0

    def _begin(self, turn: Turn) -> None:
        self._turn, self._unsent, self._received = turn, turn.send, b""

    def _exchange(self) -> bool:
        """Send and receive what the present turn asks for, as far as possible; return whether that is all of it."""
        assert self._turn is not None  # noqa: S101  # set by `_begin`
        try:
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
            while missing := self._turn.receive - len(self._received):
                received = self.connection.recv(missing)
                if not received:
                    raise UnavailableError(f"{STRANGER} went away before it had said so", STRANGER)
                self._received += received
        except BlockingIOError:
            return False
        return True


def _too_late(seconds: float, why: str = "") -> DeadlineError:
    return DeadlineError(f"{STRANGER} did not prove within {seconds:g} s that it belongs to the run{why}", seconds)
