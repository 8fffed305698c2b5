"""Where the time of a worker's steps goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paramserver.client.client import PushTimes


@dataclass(frozen=True)
class StepTimes:
    """Where the time of a worker's steps has gone; all in seconds, the sum of all steps.

    Attributes:
        steps: How many.
        computing: Outside of ``optimizer.step()``: the input, forward, backward and hooks.
        reducing: Bringing the gradients of all replicas into the memory that is pushed.
        blocked: The rest of ``optimizer.step()``, in which the worker cannot go on: without ``pipeline``, that is the
            sending and the waiting of the slowest ps.
        servers: For each ps; with ``pipeline``, that goes on while the worker computes.
    """

    steps: int
    computing: float
    reducing: float
    blocked: float
    servers: tuple[PushTimes, ...]

    def since(self, earlier: StepTimes) -> StepTimes:
        """What has come since an earlier look at the same run.

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
        """Mean seconds of a step, by name; those of a ps are called as ``ps:0/sending``.

        >>> StepTimes(2, 0.3, 0.0, 0.1, (PushTimes("ps:0", 0.02, 0.06, 0.04),)).per_step()["ps:0/waiting"]
        0.03
        """
        sums = {"computing": self.computing, "reducing": self.reducing, "blocked": self.blocked}
        for server in self.servers:
            sums |= {f"{server.task}/{name}": getattr(server, name) for name in ("sending", "waiting", "applying")}
        return {name: seconds / max(self.steps, 1) for name, seconds in sums.items()}


class StepClock:
    """Adds up what the worker itself spends, from now on. Used by the thread that trains.

    Args:
        servers: What the client adds up.
    """

    def __init__(self, servers: Sequence[PushTimes]) -> None:
        self._servers = servers
        self._at_first = list(map(replace, servers))  # copies: the model's first values were pushed, too
        self._steps = 0
        self._computing = self._reducing = self._blocked = 0.0
        self._left = time.perf_counter()

    def entered(self) -> float:
        """A step has begun."""
        now = time.perf_counter()
        self._computing += now - self._left
        return now

    def left(self, entered: float, reducing: float, *, counts: bool = True) -> None:
        """It has ended, after ``reducing`` seconds of bringing gradients together.

        Of a model's several optimizers one makes the steps that count; the seconds of all of them are those of a step.
        """
        self._left = time.perf_counter()
        self._reducing += reducing
        self._blocked += self._left - entered - reducing
        self._steps += counts

    def times(self) -> StepTimes:
        """What has been so far."""
        servers = tuple(map(_since, self._servers, self._at_first))
        return StepTimes(self._steps, self._computing, self._reducing, self._blocked, servers)


def _since(now: PushTimes, then: PushTimes) -> PushTimes:
    return PushTimes(now.task, now.sending - then.sending, now.waiting - then.waiting, now.applying - then.applying)
