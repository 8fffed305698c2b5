"""The time that a worker's steps take, by its use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paramserver.client.client import PushTimes


@dataclass(frozen=True)
class StepTimes:
    """The time of a worker's steps, by its use; all in seconds, summed over all steps.

    Attributes:
        steps: Number of steps.
        computing: Time outside of ``optimizer.step()``: the input, forward, backward and hooks.
        reducing: Time to bring the gradients of all replicas into the memory that is pushed.
        blocked: The rest of ``optimizer.step()``, in which the worker cannot go on: without ``pipeline``, the sending
            and waiting of the slowest ps.
        servers: The times of each ps; with ``pipeline``, they pass while the worker computes.
    """

    steps: int
    computing: float
    reducing: float
    blocked: float
    servers: tuple[PushTimes, ...]

    def since(self, earlier: StepTimes) -> StepTimes:
        """Return the times since an earlier result for the same run.

        >>> StepTimes(3, 0.3, 0.0, 0.1, ()).since(StepTimes(1, 0.1, 0.0, 0.1, ())).steps
        2
        """
        return StepTimes(
            self.steps - earlier.steps,
            self.computing - earlier.computing,
            self.reducing - earlier.reducing,
            self.blocked - earlier.blocked,
            tuple(map(_since, self.servers, earlier.servers)),
        )

    def per_step(self) -> dict[str, float]:
        """Return the mean seconds of a step by name; the names for a ps have the form ``ps:0/sending``.

        >>> StepTimes(2, 0.3, 0.0, 0.1, (PushTimes("ps:0", 0.02, 0.06, 0.04),)).per_step()["ps:0/waiting"]
        0.03
        """
        sums = {"computing": self.computing, "reducing": self.reducing, "blocked": self.blocked}
        for server in self.servers:
            sums |= {f"{server.task}/{name}": getattr(server, name) for name in ("sending", "waiting", "applying")}
        return {name: seconds / max(self.steps, 1) for name, seconds in sums.items()}


class StepClock:
    """Sums of the worker's own times, from now on. Used by the thread that trains.

    Args:
        servers: The sums of the client, which it goes on updating.
    """

    def __init__(self, servers: Sequence[PushTimes]) -> None:
        self._servers = servers
        self._at_first = list(map(replace, servers))  # copies: they include the push of the model's first values
        self._steps = 0
        self._computing = self._reducing = self._blocked = 0.0
        self._left = time.perf_counter()

    def entered(self) -> float:
        """Note that a step begins, and return the time."""
        now = time.perf_counter()
        self._computing += now - self._left
        return now

    def left(self, entered: float, reducing: float, *, counts: bool = True) -> None:
        """Note that a step has ended, after ``reducing`` seconds of bringing gradients together.

        Of a model's several optimizers only one makes steps that count; the seconds of all are added to those steps.
        """
        self._left = time.perf_counter()
        self._reducing += reducing
        self._blocked += self._left - entered - reducing
        self._steps += counts

    def times(self) -> StepTimes:
        """Return the times so far."""
        servers = tuple(map(_since, self._servers, self._at_first))
        return StepTimes(self._steps, self._computing, self._reducing, self._blocked, servers)


def _since(now: PushTimes, then: PushTimes) -> PushTimes:
    return PushTimes(now.task, now.sending - then.sending, now.waiting - then.waiting, now.applying - then.applying)
