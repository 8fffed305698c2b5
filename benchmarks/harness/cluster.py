"""The clusters of a measurement: bare ps tasks, or all tasks as the launcher would start them."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.crew import END_LIMIT, Child, Crew
from benchmarks.harness.job import Job
from paramserver.client.client import ParameterClient
from paramserver.cluster import ClusterSpec, TaskId
from paramserver.cluster.task import Role
from paramserver.distribute.connection import to_cluster
from paramserver.launch.spec import HOST, NO_ADDRESS, THREAD_VARIABLES, LaunchOptions, plan

CONNECT_LIMIT = 60.0
TRAINER = "benchmarks.harness.programs.trainer"


def threads_env(count: int) -> dict[str, str]:
    """Return the variables that give a process so many threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(count))


ONE_THREAD = threads_env(1)


@dataclass(frozen=True)
class Servers:
    """The ps tasks of a cluster whose other tasks join by themselves.

    Attributes:
        jobs: The addresses of the cluster, by role.
        token: The token of the run.
        children: The processes, by the ps's index.
    """

    jobs: Mapping[str, list[str]]
    token: str
    children: Sequence[Child]

    @contextlib.contextmanager
    def client(self, task: str, lane: str) -> Iterator[ParameterClient]:
        """Provide a client in this process, as ``task``, for a block. Blocks until the ps tasks are up."""
        cluster = ClusterSpec(self.jobs)
        with contextlib.closing(
            to_cluster(cluster, TaskId.parse(task), CONNECT_LIMIT, token=self.token, lane=lane)
        ) as client:
            yield client

    def env(self, task: str, lane: str) -> dict[str, str]:
        """Return the environment of a process that takes part as ``task``, with one thread."""
        return {**_env(self.jobs, task, self.token), **ONE_THREAD, "PARAMSERVER_LANE": lane}


def start_servers(
    crew: Crew,
    *,
    ps: int = 1,
    workers: int = 0,
    address: Callable[[int], str] = f"{HOST}:{{}}".format,
    env: Mapping[str, str] = ONE_THREAD,
) -> Servers:
    """Start the ps tasks of a cluster of a chief and ``workers`` workers. Does not wait for them.

    Args:
        crew: Starts the processes.
        ps: Number of ps tasks.
        workers: Number of tasks that may join, the chief not counted.
        address: Returns the address at which other tasks reach the ps that listens on a port of this host.
        env: Further variables of the ps tasks.
    """
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(ps)]
        others = {"worker": [NO_ADDRESS] * workers} if workers else {}
        jobs = {"chief": [NO_ADDRESS], **others, "ps": [address(_port(listener)) for listener in listeners]}
        token = secrets.token_hex(16)
        children = [
            crew.start_server(f"ps:{index}", {**_env(jobs, f"ps:{index}", token), **env}, listener)
            for index, listener in enumerate(listeners)
        ]
    return Servers(jobs, token, children)


class Cluster:
    """The tasks of a run.

    Attributes:
        servers: The ps tasks.
        workers: The chief and the workers.
    """

    def __init__(self, servers: Sequence[Child], workers: Sequence[Child]) -> None:
        self.servers = list(servers)
        self.workers = list(workers)

    def end(self) -> None:
        """Let the workers finish, and see that the ps tasks end by themselves.

        Raises:
            BenchmarkError: If one of them fails or stays.
        """
        for worker in self.workers:
            worker.dismiss()
        give_up = time.monotonic() + END_LIMIT
        for child in [*self.workers, *self.servers]:
            child.await_end(max(give_up - time.monotonic(), 0.1))


def start_cluster(crew: Crew, job: Job, *, workers: int, ps: int, lane: str, threads: int) -> Cluster:
    """Start a cluster as the launcher would, whose workers do ``job``; each task has ``threads`` threads."""
    # With threads given, plan() neither needs the number of cores nor looks at the variables that are set.
    options = LaunchOptions(script="a trainer", workers=workers, ps=ps, lane=lane, threads=threads)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(ps)]
        spec = plan(options, list(map(_port, listeners)), secrets.token_hex(16), "benchmark", cores=threads)
        servers, trainers = [], []
        for task in spec.tasks:
            if task.task.role is Role.PS:
                servers.append(crew.start_server(str(task.task), task.env, listeners[task.task.index]))
            else:
                trainers.append(start_trainer(crew, str(task.task), job, task.env))
    return Cluster(servers, trainers)


def start_trainer(crew: Crew, name: str, job: Job, env: Mapping[str, str]) -> Child:
    """Start a participant that does ``job``."""
    return crew.start_module(name, TRAINER, job.to_argument(), env)


def start_plain(crew: Crew, job: Job, threads: int = 1) -> Child:
    """Start a participant that does ``job`` with plain PyTorch."""
    return start_trainer(crew, "plain PyTorch", job, threads_env(threads))


def _port(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def _env(jobs: Mapping[str, list[str]], task: str, token: str) -> dict[str, str]:
    role, _, index = task.partition(":")
    config = {"cluster": jobs, "task": {"type": role, "index": int(index)}}
    return {"TF_CONFIG": json.dumps(config), "PARAMSERVER_TOKEN": token}
