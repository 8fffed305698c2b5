"""The ps tasks of a measurement, and how its other processes find them."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.processes import Child, Crew
from paramserver.client.client import ParameterClient
from paramserver.cluster import ClusterSpec, TaskId
from paramserver.distribute.connection import to_cluster
from paramserver.launch.spec import HOST, NO_ADDRESS, THREAD_VARIABLES

CONNECT_LIMIT = 60.0
ONE_THREAD = dict.fromkeys(THREAD_VARIABLES, "1")


@dataclass(frozen=True)
class Servers:
    """The ps tasks of a run.

    Attributes:
        jobs: The addresses of the cluster, by role.
        token: Of the run.
        children: The processes, by the ps's index.
    """

    jobs: Mapping[str, list[str]]
    token: str
    children: Sequence[Child]

    def client(self, task: str, lane: str) -> ParameterClient:
        """A client of this process, as ``task``. Blocks until the ps tasks are up."""
        return to_cluster(ClusterSpec(self.jobs), TaskId.parse(task), CONNECT_LIMIT, token=self.token, lane=lane)

    def env(self, task: str, lane: str) -> dict[str, str]:
        """What a process needs to take part as ``task``, with one thread."""
        return _env(self.jobs, task, self.token) | {"PARAMSERVER_LANE": lane}


def start_servers(
    crew: Crew, *, ps: int = 1, workers: int = 0, address: Callable[[int], str] = f"{HOST}:{{}}".format
) -> Servers:
    """Start the ps tasks of a cluster of a chief and ``workers`` workers, each with one thread. Does not wait for them.

    Args:
        crew: Whose processes they become.
        ps: How many.
        workers: How many tasks may join, the chief not counted.
        address: Where the others reach the ps that listens on a port of this host.
    """
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(ps)]
        addresses = [address(listener.getsockname()[1]) for listener in listeners]
        others = {"worker": [NO_ADDRESS] * workers} if workers else {}
        jobs = {"chief": [NO_ADDRESS], **others, "ps": addresses}
        token, children = secrets.token_hex(16), []
        for index, listener in enumerate(listeners):
            task = f"ps:{index}"
            children.append(crew.start_server(task, _env(jobs, task, token), listener))
    return Servers(jobs, token, children)


def _env(jobs: Mapping[str, list[str]], task: str, token: str) -> dict[str, str]:
    role, _, index = task.partition(":")
    config = {"cluster": jobs, "task": {"type": role, "index": int(index)}}
    return {"TF_CONFIG": json.dumps(config), "PARAMSERVER_TOKEN": token, **ONE_THREAD}
