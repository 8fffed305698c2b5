"""The connections of a worker's client: lanes to every ps of a cluster, or to a ps inside this process."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from paramserver.client.client import ParameterClient
from paramserver.client.exchange import Exchange
from paramserver.client.heartbeats import Heartbeats
from paramserver.cluster import ClusterSpec, Role, TaskId, environment
from paramserver.cluster.exit_codes import may_come_back
from paramserver.errors import DeadlineError, RunOverError, UnavailableError
from paramserver.server.server import play_in_process
from paramserver.transport.handshake import connect, connect_heartbeats
from paramserver.transport.identity import Identity, new_incarnation, next_generation
from paramserver.transport.lane import Lane, WorkerMemory

REDIAL_TIMEOUT = 1.0
"""Seconds for a reachable ps to answer. Only `recover` waits longer for a lost one, never a step."""


def in_process(device: torch.device) -> ParameterClient:
    """Return a client of a ps inside this process, whose variables are on ``device``."""
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
    heartbeat_timeout: float | None = None,
    find_address: FindAddress | None = None,
) -> ParameterClient:
    """Connect to every ps of a cluster. The client says goodbye when it is collected or the process ends.

    Args:
        cluster: The cluster.
        me: This task.
        timeout: Seconds to wait for the ps tasks, in all.
        token: The secret of the run; by default that of the environment.
        lane: A name of `layout.lanes`; by default that of the environment.
        process: As for `new_incarnation`.
        heartbeat_timeout: Seconds after which a silent ps, or this task, counts as lost; 0 for no limit. By default
            that of the environment.
        find_address: Returns the present address of a ps; by default that of ``cluster``.

    Raises:
        DeadlineError: If a ps does not come up within ``timeout`` seconds in all.
        TokenError: If a ps refuses the token.
        RunOverError: If the ps tasks have left already.
    """
    surroundings = environment.read()
    identity = Identity(
        task=str(me), token=surroundings.token if token is None else token, incarnation=new_incarnation(process)
    )
    dialer = ClusterDialer(
        cluster=cluster,
        me=identity,
        lane=lane or surroundings.lane,
        run_file=surroundings.run_file,
        find_address=find_address or cluster.address,
        heartbeats=Heartbeats(surroundings.heartbeat_timeout if heartbeat_timeout is None else heartbeat_timeout),
    )
    client = ParameterClient(dialer.dial_all(timeout), dialer)
    weakref.finalize(client, _leave, client.lanes, os.getpid())
    return client


FindAddress: TypeAlias = Callable[[TaskId], str]


@dataclass(frozen=True)
class InProcessDialer:
    """Dialer of a ps inside this process; see `exchange.Dialer`.

    Attributes:
        dial: Makes a lane to that ps.
    """

    dial: Callable[[], Lane]

    def dial_all(self, timeout: float, kept: Sequence[WorkerMemory] = ()) -> list[Lane]:
        """See `exchange.Dialer`."""
        return [self.dial()]

    def redial(self, ps: int, kept: WorkerMemory | None) -> Lane:
        """See `exchange.Dialer`."""
        return self.dial()

    def silence(self, ps: int) -> str:
        """See `exchange.Dialer`."""
        return ""

    def close(self) -> None:
        """See `exchange.Dialer`."""


@dataclass(kw_only=True)
class ClusterDialer:
    """Dialer of the ps tasks of a cluster; see `exchange.Dialer`.

    Attributes:
        cluster: The cluster.
        me: The identity of this task.
        lane: The name of the lanes to use; see `layout.lanes`.
        find_address: Returns the present address of a ps.
        heartbeats: The signs of life that this task exchanges with the ps tasks.
        run_file: The file of the run, which is gone when the run is over; None if the run has none.
    """

    cluster: ClusterSpec
    me: Identity
    lane: str
    heartbeats: Heartbeats
    find_address: FindAddress
    run_file: Path | None = None
    _has_dialled: bool = False

    def dial_all(self, timeout: float, kept: Sequence[WorkerMemory] = ()) -> list[Lane]:
        """See `exchange.Dialer`; raises as `to_cluster`."""
        if self._has_dialled:
            self.me = replace(self.me, incarnation=next_generation(self.me.incarnation))
        self._has_dialled = True
        give_up = time.monotonic() + timeout
        lanes: list[Lane] = []
        try:
            for ps in range(self.cluster.num_tasks(Role.PS)):
                remaining = max(round(give_up - time.monotonic(), 1), 0.0)  # rounded, because messages show it
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
        find, over = partial(self.find_address, task), self._is_over
        lane = connect(find, str(task), self.me, lane=self.lane, timeout=timeout, is_over=over, kept=kept)
        try:
            self._watch(ps, lane)
        except BaseException:
            lane.close()
            raise
        return lane

    def _watch(self, ps: int, lane: Lane) -> None:
        """Exchange heartbeats with a ps on a connection of their own."""
        if limit := self.heartbeats.timeout:
            address = self.find_address(TaskId(Role.PS, ps))
            frames = connect_heartbeats(address, lane.task, self.me, timeout=REDIAL_TIMEOUT, limit=limit)
            self.heartbeats.watch(ps, frames, lane)

    def silence(self, ps: int) -> str:
        """See `exchange.Dialer`."""
        return self.heartbeats.silence(ps)

    def close(self) -> None:
        """See `exchange.Dialer`."""
        self.heartbeats.close()

    def _is_over(self) -> bool:
        return self.run_file is not None and not self.run_file.exists()


def _leave(lanes: Exchange, pid: int) -> None:
    """Say goodbye for a task that has not done so itself; with the uncaught exception, if there is one.

    A task that was asked to leave, or has lost a ps, has neither finished nor failed. Like a lost one it says nothing.
    """
    if os.getpid() != pid:
        return  # a forked child, such as a DataLoader's, inherits the connection but not the right to end it
    uncaught = getattr(sys, "last_value", None)
    if may_come_back(uncaught):
        lanes.close()
        return
    lanes.goodbye("" if uncaught is None else f"{type(uncaught).__name__}: {uncaught}")
