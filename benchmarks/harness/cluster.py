"""The clusters of a measurement."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.harness.crew import END_LIMIT, Child, Crew
from benchmarks.harness.programs.trainer import Job
from paramserver.client.client import ParameterClient
from paramserver.cluster import ClusterSpec, TaskId
from paramserver.distribute.connection import to_cluster
from paramserver.launch.spec import HOST, NO_ADDRESS, THREAD_VARIABLES, LaunchOptions, runtime_variables

CONNECT_LIMIT = 60.0
TRAINER = "benchmarks.harness.programs.trainer"


def threads_env(count: int) -> dict[str, str]:
    """Return the variables that give a process so many threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(count))


ONE_THREAD = threads_env(1)


@dataclass(kw_only=True)
class Cluster:
    """A cluster that has ps tasks, and that other tasks may join.

    Attributes:
        jobs: The addresses of the tasks, by role.
        token: The token of the run.
        shared: Variables of all tasks.
        servers: The processes of the ps tasks, by index.
        workers: The processes of the chief and the workers, where `start_training` has started them.
    """

    jobs: Mapping[str, list[str]]
    token: str
    shared: Mapping[str, str]
    servers: list[Child] = field(default_factory=list)
    workers: list[Child] = field(default_factory=list)

    @contextlib.contextmanager
    def client(self, task: str, lane: str) -> Iterator[ParameterClient]:
        """Provide a client in this process, as ``task``, for a block. Blocks until the ps tasks are up."""
        cluster = ClusterSpec(self.jobs)
        with contextlib.closing(
            to_cluster(cluster, TaskId.parse(task), CONNECT_LIMIT, token=self.token, lane=lane)
        ) as client:
            yield client

    def env(self, task: str, lane: str) -> dict[str, str]:
        """Return the environment of a process that takes part as ``task``."""
        role, _, index = task.partition(":")
        config = json.dumps({"cluster": self.jobs, "task": {"type": role, "index": int(index)}})
        return {**self.shared, "TF_CONFIG": config, "PARAMSERVER_TOKEN": self.token, "PARAMSERVER_LANE": lane}

    def end(self) -> None:
        """Let all workers finish, and see that the ps tasks end by themselves.

        Raises:
            BenchmarkError: If one of them fails or stays.
        """
        for worker in self.workers:
            worker.dismiss()
        give_up = time.monotonic() + END_LIMIT
        for child in [*self.workers, *self.servers]:
            child.await_end(max(give_up - time.monotonic(), 0.1))


def start_cluster(
    crew: Crew,
    *,
    ps: int = 1,
    workers: int = 0,
    address: Callable[[int], str] = f"{HOST}:{{}}".format,
    shared: Mapping[str, str] = ONE_THREAD,
) -> Cluster:
    """Start the ps tasks of a cluster of a chief and ``workers`` workers. Does not wait for them.

    Args:
        crew: Starts the processes.
        ps: Number of ps tasks.
        workers: Number of tasks that may join, the chief not counted.
        address: Returns the address at which other tasks reach the ps that listens on a port of this host.
        shared: Variables of all tasks.
    """
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(ps)]
        jobs = {
            "chief": [NO_ADDRESS],
            **({"worker": [NO_ADDRESS] * workers} if workers else {}),
            "ps": [address(listener.getsockname()[1]) for listener in listeners],
        }
        cluster = Cluster(jobs=jobs, token=secrets.token_hex(16), shared=shared)
        for index, listener in enumerate(listeners):
            task = f"ps:{index}"
            cluster.servers.append(
                crew.start_module(task, "paramserver", "server", cluster.env(task, "auto"), listener)
            )
    return cluster


def start_training(crew: Crew, job: Job, *, workers: int, ps: int, lane: str, threads: int) -> Cluster:
    """Start a cluster with trainers, the launcher's variables, and ``threads`` threads for each task."""
    shared = runtime_variables(LaunchOptions(script="a trainer", threads=threads), cores=threads)
    cluster = start_cluster(crew, ps=ps, workers=workers - 1, shared=shared)
    tasks = ["chief:0", *(f"worker:{index}" for index in range(workers - 1))]
    cluster.workers += [start_trainer(crew, task, job, cluster.env(task, lane)) for task in tasks]
    return cluster


def start_trainer(crew: Crew, name: str, job: Job, env: Mapping[str, str]) -> Child:
    """Start a participant that does ``job``."""
    return crew.start_module(name, TRAINER, job.to_argument(), env)


def start_plain(crew: Crew, job: Job, threads: int = 1) -> Child:
    """Start a participant that does ``job`` with plain PyTorch."""
    return start_trainer(crew, "plain PyTorch", job, threads_env(threads))
