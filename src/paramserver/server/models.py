"""The models that a ps holds: one for each strategy that the workers' processes have.

Rules
    * Most runs have one. A process that makes another strategy (a cell of a notebook that is run again, a second fold
      of a cross validation) gets another model, independent of the first, with a store and a global step of its own;
      the membership counts them. The n-th strategies of all workers share a model.
    * A model that is left by everyone while the run goes on with another one is given up, and its memory with it.
"""

from __future__ import annotations

import threading
from collections import Counter

from paramserver.server.handler import RequestHandler
from paramserver.store.membership import Membership
from paramserver.store.store import Allocate, Store
from paramserver.wire import messages


class Models:
    """The models of one ps. Thread-safe.

    Args:
        task: The ps, for messages.
        allocate: Makes the memory for arenas.
        membership: Who takes part in the run.
    """

    def __init__(self, task: str, allocate: Allocate, membership: Membership) -> None:
        self._task = task
        self._allocate = allocate
        self._membership = membership
        self._lock = threading.Lock()
        self._stores: dict[int, Store] = {}
        self._handlers: dict[int, RequestHandler] = {}
        self._users: Counter[int] = Counter()
        self._failure = ""
        self.handler(0)

    def handler(self, number: int) -> RequestHandler:
        """What carries out the requests about a model, which is made if there is none of that number."""
        with self._lock:
            if number not in self._handlers:
                store = self._stores[number] = Store(self._task, self._allocate)
                self._handlers[number] = RequestHandler(store, self._membership, self.fail)
                if self._failure:
                    store.fail(self._failure)
            return self._handlers[number]

    def enter(self, number: int) -> RequestHandler:
        """`handler`, for a worker that has connected."""
        with self._lock:
            self._users[number] += 1
        return self.handler(number)

    def leave(self, number: int, *, said_goodbye: bool) -> None:
        """A worker's connection has ended."""
        with self._lock:
            self._users[number] -= 1
            is_over = said_goodbye and not self._users[number] and any(self._users.values())
            if is_over and number in self._stores:
                del self._handlers[number]
                self._stores.pop(number).close()

    def fail(self, reason: str) -> None:
        """The chief cannot go on: from now on every request about any model is refused with ``reason``."""
        with self._lock:
            self._failure = reason
            for store in self._stores.values():
                store.fail(reason)

    def check_alive(self) -> None:
        """Raises RefusedError if the run has failed."""
        with self._lock:
            stores = list(self._stores.values())
        for store in stores:
            store.check_alive()

    def close(self) -> None:
        """End every wait. Idempotent."""
        with self._lock:
            for store in self._stores.values():
                store.close()

    def status(self) -> messages.Status:
        """What all models together hold and have done; the global step is the newest one's."""
        with self._lock:
            handlers = [self._handlers[number] for number in sorted(self._handlers)]
        each = [handler.status() for handler in handlers]
        newest = each[-1]
        return messages.Status(
            task=self._task,
            num_variables=sum(status.num_variables for status in each),
            values_bytes=sum(status.values_bytes for status in each),
            slots_bytes=sum(status.slots_bytes for status in each),
            global_step=newest.global_step,
            updates=sum(status.updates for status in each),
            mean_staleness=newest.mean_staleness,
            largest_staleness=max(status.largest_staleness for status in each),
            joined=newest.joined,
        )

    def __repr__(self) -> str:
        with self._lock:
            stores = [self._stores[number] for number in sorted(self._stores)]
        return ", ".join(map(repr, stores)) or f"<nothing on {self._task}>"
