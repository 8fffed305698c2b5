"""The models that a ps holds: one for each strategy in the workers' processes.

Rules
    * Most runs have one model. A process that makes another strategy (a notebook cell that is run again, a second fold
      of a cross validation) gets another model, independent of the first, with its own store and global step; the
      membership counts them. The n-th strategies of all workers share a model.
    * A model that every worker has left while the run goes on with another model is given up, and its memory is freed.
"""

from __future__ import annotations

import threading
from collections import Counter

from paramserver.server.handler import RequestHandler
from paramserver.store.membership import Membership
from paramserver.store.store import Allocate, Store
from paramserver.transport.complaints import Complaints
from paramserver.wire import messages


class Models:
    """The models of one ps. Thread-safe.

    Args:
        task: The ps, for messages.
        allocate: Makes the memory for arenas.
        membership: The tasks that take part in the run.
        complaints: Takes the faults of peers.
    """

    def __init__(self, task: str, allocate: Allocate, membership: Membership, complaints: Complaints) -> None:
        self._task = task
        self._allocate = allocate
        self._membership = membership
        self._complaints = complaints
        self._lock = threading.Lock()
        self._stores: dict[int, Store] = {}
        self._handlers: dict[int, RequestHandler] = {}
        self._users: Counter[int] = Counter()
        self._failure = ""
        self.handler(0)

    def handler(self, number: int) -> RequestHandler:
        """Return the handler of requests about a model; create the model if no model has this number."""
        with self._lock:
            if number not in self._handlers:
                store = self._stores[number] = Store(self._task, self._allocate)
                self._handlers[number] = RequestHandler(store, self._membership, self.fail, self._complaints)
                if self._failure:
                    store.fail(self._failure)
            return self._handlers[number]

    def enter(self, number: int) -> RequestHandler:
        """Count a worker that has connected as a user of a model, and return the `handler` of the model."""
        with self._lock:
            self._users[number] += 1
        return self.handler(number)

    def leave(self, number: int, *, said_goodbye: bool) -> None:
        """Note that a worker's connection has ended, and give up the model if nothing uses it any more."""
        with self._lock:
            self._users[number] -= 1
            is_over = said_goodbye and not self._users[number] and any(self._users.values())
            if is_over and number in self._stores:
                del self._handlers[number]
                self._stores.pop(number).close()

    def fail(self, reason: str) -> None:
        """Refuse from now on every request about any model with ``reason``, because the chief cannot go on."""
        with self._lock:
            self._failure = reason
            for store in self._stores.values():
                store.fail(reason)

    def check_alive(self) -> None:
        """Raise an error if the run has failed.

        Raises:
            RunFailedError: With the reason of the failure.
        """
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
        """Return the contents and counters of all models together; the global step is that of the newest model."""
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
