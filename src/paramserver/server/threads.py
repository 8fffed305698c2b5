"""The threads that serve the connections of a ps: one for all that are quick, and one for each that is not.

Rules
    * A connection has a thread of its own until a request of it was quick. Then it waits among others, if any, and one
      thread, the leader, waits for all of them and carries out what they send, one request after the other. So
      however many send at once, nobody waits for the interpreter's lock behind all others at each system call.
    * The leader waits for nothing else. Whoever leads and is about to wait, for the rest of a request, for a peer that
      does not take its answer, or for work that may take long, hands the lead on first. From there on that
      connection has this thread for itself, again until a request of it was quick.
    * One thread waits to lead next, so that handing the lead on rarely means to start a thread.

The pattern is known as leader and followers.
"""

from __future__ import annotations

import enum
import os
import selectors
import threading
from collections.abc import Callable
from typing import Protocol

Hook = Callable[[], None]


class Pace(enum.Enum):
    """What became of a request."""

    QUICK = "quick"
    """It was carried out without waiting, and nothing more has come: the next one may be waited for among others."""
    SLOW = "slow"
    """It was not, or more has come; or the connection has only begun."""
    OVER = "over"
    """There will be no more."""


class Served(Protocol):
    """A connection. All but `hang_up` is called by one thread at a time.

    Attributes:
        before_wait: Called once by `proceed`, if it is not None, before it waits for anything but the beginning of a
            request, and before the connection's descriptor is given back. Whom it calls sets it to None.
    """

    before_wait: Hook | None

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is something to `proceed` with."""

    def proceed(self) -> Pace:
        """Go one request further. Blocks until it has come and is carried out. Raises nothing."""

    def end(self) -> None:
        """Give back everything, after `proceed` said that it is over. Raises nothing."""

    def hang_up(self) -> None:
        """End the stream, so that `proceed` soon says that it is over. Any thread may call it, at any time."""


class ServingThreads:
    """Serves connections, until `stop`. Thread-safe.

    Args:
        name: Of its threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: list[threading.Thread] = []
        self._served: set[Served] = set()
        self._stop_lock = threading.Lock()
        self._lead = threading.Lock()
        self._lock = threading.Lock()  # for all that follows
        self._selector = selectors.DefaultSelector()
        self._wake: tuple[int, ...] = os.pipe()
        self._selector.register(self._wake[0], selectors.EVENT_READ)
        self._num_waiting = 0
        self._has_follower = False
        self._stopping = False
        self._at_hand: Served | None = None  # what the leader is busy with; only the leader uses it

    def add(self, connection: Served) -> None:
        """Serve a connection from now on, until it is over."""
        with self._lock:
            self._served.add(connection)
        self._start(self._serve, connection)

    def stop(self) -> None:
        """Hang up every connection and wait until all threads have ended. Idempotent; nothing is added any more."""
        with self._stop_lock:
            if self._stopping:
                return
            self._stopping = True
            with self._lock:
                served = list(self._served)
            for connection in served:
                connection.hang_up()
            os.write(self._wake[1], b"\0")
            while self._threads:  # the last ones may start others
                self._threads.pop().join()
            self._selector.close()
            for descriptor in self._wake:
                os.close(descriptor)

    def __repr__(self) -> str:
        with self._lock:
            threads = sum(thread.is_alive() for thread in self._threads)
            return f"<ServingThreads: {len(self._served)} connections, {self._num_waiting} on one of {threads} threads>"

    def _start(self, target: Callable[..., None], *args: Served) -> None:
        # Daemons: a program that fails before it has stopped its server must end all the same.
        thread = threading.Thread(target=target, args=args, name=self._name, daemon=True)
        thread.start()
        with self._lock:
            self._threads[:] = [other for other in self._threads if other.is_alive()] + [thread]

    def _serve(self, connection: Served) -> None:
        self._stay_with(connection, Pace.SLOW)
        self._have_follower()  # another thread than this one, which keeps its argument for as long as it lives

    def _stay_with(self, connection: Served, pace: Pace) -> None:
        """Serve a connection, whose last request went as told, until it is quick or over; a lone one until it is over.

        To wait for one that may be read, and then to read, takes longer than to read; where there are no others it
        gains nothing.
        """
        while pace is Pace.SLOW or (pace is Pace.QUICK and len(self._served) == 1):
            pace = connection.proceed()
        if pace is Pace.OVER:
            connection.end()
            with self._lock:
                self._served.discard(connection)
        else:
            connection.before_wait = self._hand_on
            with self._lock:
                self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
                self._num_waiting += 1

    def _follow(self) -> None:
        """Lead when it is this thread's turn, again and again; return as soon as another one waits for that."""
        while self._is_needed():
            self._lead.acquire()  # released by `_hand_on`, in the middle of a request
            with self._lock:
                self._has_follower = False
            while self._num_waiting or not self._stopping:
                if not self._serve_ready():
                    break
            else:
                self._lead.release()
                return

    def _is_needed(self) -> bool:
        with self._lock:
            has_follower, self._has_follower = self._has_follower, True
            return not has_follower

    def _serve_ready(self) -> bool:
        """Wait for those who wait, and serve whoever is ready; False if this thread leads no more."""
        for key, _ in self._selector.select():
            if key.data is None:
                os.read(self._wake[0], 1)
            elif not self._serve_one(key.data):
                return False
        return True

    def _serve_one(self, connection: Served) -> bool:
        self._at_hand = connection
        pace = connection.proceed()
        if connection.before_wait and pace is Pace.QUICK:
            return True
        if connection.before_wait:
            self._hand_on()
        self._stay_with(connection, pace)
        return False

    def _hand_on(self) -> None:
        """Let another thread lead. Called by the leader, which has the connection at hand for itself afterwards."""
        connection, self._at_hand = self._at_hand, None
        if connection:
            connection.before_wait = None
            with self._lock:
                self._selector.unregister(connection.fileno())
                self._num_waiting -= 1
        self._lead.release()
        self._have_follower()

    def _have_follower(self) -> None:
        if not self._has_follower:
            self._start(self._follow)
