"""How a worker gets its client: lanes to every ps of a cluster, or to one that is played in this process."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Sequence

import torch

from paramserver.client import ParameterClient
from paramserver.cluster import ClusterSpec, Role, TaskId, environment
from paramserver.lanes import Lanes
from paramserver.server import play_in_process
from paramserver.transport.handshake import Identity, connect, new_incarnation
from paramserver.transport.lane import Lane


def in_process(device: torch.device) -> ParameterClient:
    """A client of a ps that is played in this process, its variables on ``device``."""
    return ParameterClient([play_in_process(device)])


def to_cluster(
    cluster: ClusterSpec, me: TaskId, timeout: float, *, token: str | None = None, lane: str | None = None
) -> ParameterClient:
    """Connect to every ps of a cluster. The client says goodbye when it is collected or the process ends.

    Args:
        cluster: The cluster.
        me: This task.
        timeout: Seconds to wait for the ps tasks, in all.
        token: The secret of the run; by default the environment's.
        lane: ``auto`` or ``tcp``; by default the environment's.

    Raises:
        DeadlineError: If a ps does not come up within ``timeout`` seconds in all.
        TokenError: If the run's token does not fit.
        RunOverError: If the ps tasks have left already.
    """
    client = ParameterClient(_lanes(cluster, me, timeout, token, lane))
    weakref.finalize(client, _leave, client.lanes, os.getpid())
    return client


def lanes_again(cluster: ClusterSpec, me: TaskId, timeout: float, client: ParameterClient) -> list[Lane]:
    """New lanes to every ps for a client that has lost one, of kinds that fit its memory; raises as `to_cluster`."""
    return _lanes(cluster, me, timeout, ways=client.ways)


def _lanes(
    cluster: ClusterSpec,
    me: TaskId,
    timeout: float,
    token: str | None = None,
    lane: str | None = None,
    ways: Sequence[str] = (),
) -> list[Lane]:
    surroundings = environment.read()
    token, way = surroundings.token if token is None else token, lane or surroundings.lane
    identity = Identity(task=str(me), token=token, incarnation=new_incarnation())
    give_up = time.monotonic() + timeout
    lanes: list[Lane] = []
    try:
        for index, task in enumerate(cluster.tasks(Role.PS)):
            remaining = max(round(give_up - time.monotonic(), 1), 0.0)  # a person may read it
            kind = ways[index] if ways else way
            address, listens = cluster.address(task), surroundings.ps_listen
            lanes.append(connect(address, str(task), identity, lane=kind, timeout=remaining, listens=listens))
    except BaseException:
        Lanes(lanes).close()
        raise
    return lanes


def _leave(lanes: Lanes, pid: int) -> None:
    """The last words of a task that did not say goodbye itself."""
    if os.getpid() != pid:
        return  # a forked child, such as a DataLoader's, inherits the connection but not the right to end it
    uncaught = getattr(sys, "last_value", None)
    lanes.goodbye("" if uncaught is None else f"{type(uncaught).__name__}: {uncaught}")
