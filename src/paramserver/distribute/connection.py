"""How a worker gets its client: lanes to every ps of a cluster, or to one that is played in this process."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from paramserver.client.client import ParameterClient
from paramserver.client.exchange import Exchange
from paramserver.cluster import ClusterSpec, Role, TaskId, environment
from paramserver.errors import DeadlineError, RunOverError, UnavailableError
from paramserver.server.server import play_in_process
from paramserver.transport.handshake import connect
from paramserver.transport.identity import Identity, new_incarnation
from paramserver.transport.lane import Lane, WorkerMemory

REDIAL_TIMEOUT = 1.0
"""Seconds in which a ps that is there answers. One that was lost is waited for by `recover`, and not by a step."""


def in_process(device: torch.device) -> ParameterClient:
    """A client of a ps that is played in this process, its variables on ``device``."""
    dialer = InProcessDialer(play_in_process(device))
    return ParameterClient(dialer.dial_all(0), dialer)


def to_cluster(
    cluster: ClusterSpec,
    me: TaskId,
    timeout: float,
    *,
    token: str | None = None,
    lane: str | None = None,
    process: str = "",
) -> ParameterClient:
    """Connect to every ps of a cluster. The client says goodbye when it is collected or the process ends.

    Args:
        cluster: The cluster.
        me: This task.
        timeout: Seconds to wait for the ps tasks, in all.
        token: The secret of the run; by default the environment's.
        lane: A name of `layout.lanes`; by default the environment's.
        process: As for `new_incarnation`.

    Raises:
        DeadlineError: If a ps does not come up within ``timeout`` seconds in all.
        TokenError: If the run's token does not fit.
        RunOverError: If the ps tasks have left already.
    """
    surroundings = environment.read()
    identity = Identity(
        task=str(me), token=surroundings.token if token is None else token, incarnation=new_incarnation(process)
    )
    dialer = ClusterDialer(cluster, identity, lane=lane or surroundings.lane, listens=surroundings.ps_listen)
    client = ParameterClient(dialer.dial_all(timeout), dialer)
    weakref.finalize(client, _leave, client.lanes, os.getpid())
    return client


@dataclass(frozen=True)
class InProcessDialer:
    """See `exchange.Dialer`.

    Attributes:
        dial: Makes a lane to the ps in this process.
    """

    dial: Callable[[], Lane]

    def dial_all(self, timeout: float, kept: Sequence[WorkerMemory] = ()) -> list[Lane]:
        """See `exchange.Dialer`."""
        return [self.dial()]

    def redial(self, ps: int, kept: WorkerMemory | None) -> Lane:
        """See `exchange.Dialer`."""
        return self.dial()


@dataclass(frozen=True)
class ClusterDialer:
    """See `exchange.Dialer`.

    Attributes:
        cluster: The cluster.
        me: The task.
        lane: The name of the lanes to use; see `layout.lanes`.
        listens: Whether a ps that does not listen has ended, and with it the run.
    """

    cluster: ClusterSpec
    me: Identity
    lane: str
    listens: bool

    def dial_all(self, timeout: float, kept: Sequence[WorkerMemory] = ()) -> list[Lane]:
        """See `exchange.Dialer`; raises as `to_cluster`."""
        give_up = time.monotonic() + timeout
        lanes: list[Lane] = []
        try:
            for ps in range(self.cluster.num_tasks(Role.PS)):
                remaining = max(round(give_up - time.monotonic(), 1), 0.0)  # a person may read it
                lanes.append(self._dial(ps, kept[ps] if kept else None, remaining))
        except BaseException:
            Exchange(lanes).close()
            raise
        return lanes

    def redial(self, ps: int, kept: WorkerMemory | None) -> Lane:
        """See `exchange.Dialer`."""
        try:
            return self._dial(ps, kept, REDIAL_TIMEOUT)
        except (DeadlineError, RunOverError) as error:
            task = str(TaskId(Role.PS, ps))
            raise UnavailableError(f"{task} was lost, and cannot be reached any more: {error}", task) from error

    def _dial(self, ps: int, kept: WorkerMemory | None, timeout: float) -> Lane:
        task = TaskId(Role.PS, ps)
        address = self.cluster.address(task)
        return connect(address, str(task), self.me, lane=self.lane, timeout=timeout, listens=self.listens, kept=kept)


def _leave(lanes: Exchange, pid: int) -> None:
    """The last words of a task that did not say goodbye itself."""
    if os.getpid() != pid:
        return  # a forked child, such as a DataLoader's, inherits the connection but not the right to end it
    uncaught = getattr(sys, "last_value", None)
    lanes.goodbye("" if uncaught is None else f"{type(uncaught).__name__}: {uncaught}")
