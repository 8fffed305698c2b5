"""The threads that serve the connections of a ps: one for all quick connections, and one for each slow one.

Rules
    * A connection has a thread of its own until one of its requests was quick. Then it joins the waiting connections,
      if there are any others: one thread, the leader, waits for all of these and carries out their requests one after
      the other. So, with any number of senders at once, no thread queues for the interpreter's lock at each system
      call.
    * The leader waits for nothing else. Before the leader waits for the rest of a request, for a peer that does not
      take its answer, or for work that may take long, it hands the lead on. From then on it serves only the connection
      at hand, again until one of its requests was quick.
    * One thread, the follower, waits to lead next, so that handing the lead on rarely has to start a thread.

The pattern is known as leader and followers.
"""

from __future__ import annotations

import enum
import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from typing import Protocol

from paramserver.transport.complaints import Complaints

logger = logging.getLogger(__name__)

Hook = Callable[[], None]

DRAIN_TIMEOUT = 5.0
"""Seconds for the requests at hand when a ps ends."""


class Pace(enum.Enum):
    """Outcome of a request."""

    QUICK = "quick"
    """The request was carried out without waiting, and nothing more has come: its connection may wait among others."""
    SLOW = "slow"
    """The request was slow, or more has come, or the connection has only begun."""
    OVER = "over"
    """The connection is over."""


class Served(Protocol):
    """A connection. All methods but `drain` and `hang_up` are called by one thread at a time.

    Attributes:
        before_wait: Called once by `proceed`, if it is not None, before `proceed` waits for anything but the beginning
            of a request, and before the connection's descriptor is given back. The called function sets it to None.
        is_seldom: Whether requests are so seldom that the connection does not count as another one: a worker that is
            alone with it is served as if alone.
    """

    before_wait: Hook | None
    is_seldom: bool

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to `proceed` with."""

    def proceed(self) -> Pace:
        """Receive one request and carry it out. Blocks until that is done. Raises nothing."""

    def end(self) -> None:
        """Release all resources, after `proceed` has returned `Pace.OVER`. Raises nothing."""

    def drain(self) -> None:
        """Receive no more, so that `proceed` returns `Pace.OVER` after the request at hand and its answer."""

    def hang_up(self) -> None:
        """End the stream, so that `proceed` soon returns `Pace.OVER`. Any thread may call this at any time."""


class ServingThreads:
    """Serves connections until `stop`. Thread-safe.

    Args:
        name: Name of the threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._complaints = Complaints(logger.warning)
        self._threads: list[threading.Thread] = []
        self._served: set[Served] = set()
        self._num_frequent = 0
        self._stop_lock = threading.Lock()
        self._lead = threading.Lock()  # held by the leader; `_hand_on` releases it
        self._lock = threading.Lock()  # guards the attributes below; held for moments only
        self._selector = selectors.DefaultSelector()
        self._wake: tuple[int, ...] = os.pipe()
        self._selector.register(self._wake[0], selectors.EVENT_READ)
        self._num_waiting = 0
        self._has_follower = False
        self._stopping = False
        self._at_hand: Served | None = None  # the connection that the leader serves; only the leader uses this

    def add(self, connection: Served) -> None:
        """Serve a connection from now on, until it is over.

        Raises:
            RuntimeError: If no thread can be started; the connection stays the caller's.
        """
        with self._lock:
            self._served.add(connection)
            self._num_frequent += not connection.is_seldom
        try:
            self._start(self._serve, connection)
        except BaseException:
            self._forget(connection)
            raise

    def hang_up(self, is_meant: Callable[[Served], bool]) -> None:
        """Hang up some of the connections."""
        with self._lock:
            served = list(self._served)
        for connection in served:
            if is_meant(connection):
                connection.hang_up()

    def stop(self) -> None:
        """End every connection after the request at hand, and wait for all threads. Idempotent; the end of all serving.

        A request that takes longer than `DRAIN_TIMEOUT`, such as one whose peer takes no answer, is cut off.
        """
        with self._stop_lock:
            if self._stopping:
                return
            self._stopping = True
            with self._lock:
                served = list(self._served)
            for connection in served:
                connection.drain()
            os.write(self._wake[1], b"\0")
            give_up = time.monotonic() + DRAIN_TIMEOUT
            while self._threads:  # the last threads may start others
                thread = self._threads.pop()
                thread.join(max(give_up - time.monotonic(), 0.0))
                if thread.is_alive():
                    self.hang_up(lambda _: True)
                    thread.join()
            self._selector.close()
            for descriptor in self._wake:
                os.close(descriptor)

    def __repr__(self) -> str:
        with self._lock:
            threads = sum(thread.is_alive() for thread in self._threads)
            return f"<ServingThreads: {len(self._served)} connections, {self._num_waiting} on one of {threads} threads>"

    def _start(self, target: Callable[..., None], *args: Served) -> None:
        # Daemon threads: a program that fails before it has stopped its server must still be able to exit.
        thread = threading.Thread(target=target, args=args, name=self._name, daemon=True)
        thread.start()
        with self._lock:
            self._threads[:] = [other for other in self._threads if other.is_alive()] + [thread]

    def _serve(self, connection: Served) -> None:
        self._stay_with(connection, Pace.SLOW)
        # Preferably a new thread, because this one would keep its argument for as long as it lives.
        if not self._have_follower():
            self._follow()

    def _stay_with(self, connection: Served, pace: Pace) -> None:
        """Serve a connection until it is quick or over; a lone connection until it is over.

        Selecting and then reading takes longer than reading alone, and gains nothing without other connections.

        Args:
            connection: The connection.
            pace: The outcome of its last request.
        """
        while pace is Pace.SLOW or (pace is Pace.QUICK and self._is_alone(connection)):
            pace = connection.proceed()
        if pace is Pace.OVER:
            connection.end()
            self._forget(connection)
        else:
            connection.before_wait = self._hand_on
            with self._lock:
                self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
                self._num_waiting += 1

    def _forget(self, connection: Served) -> None:
        with self._lock:
            self._served.discard(connection)
            self._num_frequent -= not connection.is_seldom

    def _is_alone(self, connection: Served) -> bool:
        return self._num_frequent == 1 and not connection.is_seldom

    def _follow(self) -> None:
        """Lead whenever it is this thread's turn; return as soon as another thread waits for its turn."""
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
        """Wait for the waiting connections, and serve those that are ready; return whether this thread still leads."""
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
        """Let another thread lead, and keep the connection at hand for this thread. Called by the leader."""
        connection, self._at_hand = self._at_hand, None
        if connection:
            connection.before_wait = None
            with self._lock:
                self._selector.unregister(connection.fileno())
                self._num_waiting -= 1
        self._lead.release()
        self._have_follower()

    def _have_follower(self) -> bool:
        """Have a thread wait for its turn to lead; return False if there is none and none can be started.

        A leader that hands the lead on takes it again then, as soon as it is done with the connection at hand.
        """
        if not self._has_follower:
            try:
                self._start(self._follow)
            except RuntimeError as error:  # the limit for threads is reached
                self._complaints.add("thread", f"{self._name} with fewer threads: {error}; raise the limit (ulimit -u)")
                return False
        return True
