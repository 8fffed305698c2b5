"""Signs of life to every ps, and those of the ps tasks, on a thread of its own.

Rules
    * Each ps has a connection for heartbeats alone: a request that takes long delays none.
    * A ps that has not answered a heartbeat within the time limit counts as lost. Then the task's lane to it is closed,
      which ends any wait for it.
    * The end of a connection for heartbeats says nothing: the ps has ended, and the lane says so by itself.
    * Answers that have come are read before the time is looked at: a process that was stopped for a while must not take
      others for silent.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from paramserver.errors import ParameterServerError
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import Lane
from paramserver.wire.messages import Heartbeat

logger = logging.getLogger(__name__)

BEATS = 6
"""Number of heartbeats within the time limit."""


@dataclass
class _Watched:
    """One ps.

    Attributes:
        frames: The connection for heartbeats.
        lane: The lane that is closed when the ps is silent.
        unanswered_since: When the oldest unanswered heartbeat was sent; None if all are answered.
    """

    frames: FrameSocket
    lane: Lane
    unanswered_since: float | None = None


class Heartbeats:
    """The heartbeats of one task. `watch`, `silence` and `close` are for one thread, the one that asks the ps tasks.

    Args:
        timeout: The time limit in seconds; 0 for no heartbeats.
        clock: Returns seconds that never decrease.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout = timeout
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows; held for moments only
        self._watched: dict[int, _Watched] = {}
        self._silent: dict[int, str] = {}
        self._over = False
        self._wake: tuple[int, ...] = ()
        self._thread: threading.Thread | None = None

    def watch(self, ps: int, frames: FrameSocket, lane: Lane) -> None:
        """Exchange heartbeats with a ps from now on, instead of by an earlier connection to it."""
        if self._thread is None:
            self._wake = os.pipe()
            self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
            self._thread.start()
        with self._lock:
            old = self._watched.get(ps)
            self._watched[ps] = _Watched(frames, lane)
            self._silent.pop(ps, None)
        if old is not None:
            old.frames.close()
        os.write(self._wake[1], b"\0")

    def silence(self, ps: int) -> str:
        """Return what is to be said of a ps that counts as lost because it was silent; empty if it was not."""
        with self._lock:
            return self._silent.get(ps, "")

    def close(self) -> None:
        """End all heartbeats. Idempotent; `watch` may begin anew."""
        if self._thread is None:
            return
        self._over = True
        os.write(self._wake[1], b"\0")
        self._thread.join()
        for watched in self._watched.values():
            watched.frames.close()
        self._watched.clear()
        for descriptor in self._wake:
            os.close(descriptor)
        self._thread, self._wake, self._over = None, (), False

    def _run(self) -> None:
        beat_at = self._clock()
        while not self._over:
            now = self._clock()
            if now >= beat_at:
                beat_at = now + self.timeout / BEATS
                self._beat(now)
            self._receive(max(beat_at - now, 0.0))
            self._find_silent()

    def _beat(self, now: float) -> None:
        for ps, watched in self._all():
            if watched.unanswered_since is None:
                watched.unanswered_since = now
                try:
                    watched.frames.send(Heartbeat())
                except ParameterServerError:
                    self._drop(ps, watched)

    def _receive(self, timeout: float) -> None:
        """Read the answers that come within a time, at most one from each ps."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[0], selectors.EVENT_READ)
            for ps, watched in self._all():
                if not watched.frames.is_closed:
                    selector.register(watched.frames, selectors.EVENT_READ, (ps, watched))
            for key, _ in selector.select(timeout):
                if key.data is None:
                    os.read(self._wake[0], 64)
                else:
                    self._take_answer(*key.data)

    def _take_answer(self, ps: int, watched: _Watched) -> None:
        try:
            answer = watched.frames.receive()
        except ParameterServerError:
            answer = None
        if answer is None:
            self._drop(ps, watched)
        watched.unanswered_since = None

    def _find_silent(self) -> None:
        now = self._clock()
        for ps, watched in self._all():
            if watched.unanswered_since is not None and now - watched.unanswered_since > self.timeout:
                task = watched.lane.task
                said = f"{task} has given no sign of life for {self.timeout:g} s, and counts as lost"
                logger.warning("%s; is it stopped, or its network down?", said)
                with self._lock:
                    self._silent[ps] = said
                self._drop(ps, watched)
                watched.lane.close()

    def _drop(self, ps: int, watched: _Watched) -> None:
        with self._lock:
            if self._watched.get(ps) is watched:
                del self._watched[ps]
        watched.frames.close()

    def _all(self) -> list[tuple[int, _Watched]]:
        with self._lock:
            return list(self._watched.items())
