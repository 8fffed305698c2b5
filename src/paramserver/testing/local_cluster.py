"""A cluster inside one process: real ps tasks on real sockets, for tests of programs that use paramserver."""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType
from typing import Self

from paramserver.client.client import ParameterClient
from paramserver.cluster import ClusterSpec, Role, SimpleClusterResolver, TaskId, as_tf_config, environment
from paramserver.distribute import connection
from paramserver.errors import ConfigError
from paramserver.layout.lanes import check_lane
from paramserver.server.server import GRACE, Server
from paramserver.transport.identity import new_process

HOST = "127.0.0.1"
CONNECT_TIMEOUT = 30.0


class LocalCluster:
    """ps tasks that serve on free ports while the context is entered; nothing of them is left afterwards.

    The test plays the workers: each by a `client` of its own, or by a strategy with the task's `resolver`, on a thread
    or one after the other, or by processes that are started with the task's `environment`.

    Args:
        ps: Number of parameter servers.
        workers: Number of tasks that train, including the chief.
        lane: ``auto``, or ``tcp`` to avoid shared memory; for `client` and `environment`.
        token: The secret of the run; by default that of this process, which its strategies hold.
        grace: Seconds that the ps tasks wait for absent workers; as in `paramserver.Server`.

    Attributes:
        spec: The cluster.
        servers: The ps tasks, by index; empty outside the context.

    Example:
        >>> with LocalCluster(ps=2, workers=2) as cluster:
        ...     print([status.task for status in cluster.client("worker:0").status()])
        ['ps:0', 'ps:1']
    """

    def __init__(
        self,
        ps: int = 2,
        workers: int = 2,
        lane: str = "auto",
        *,
        token: str | None = None,
        grace: float = GRACE,
    ) -> None:
        if ps < 1 or workers < 1:
            raise ConfigError(f"a cluster needs a ps and a chief: got ps={ps} and workers={workers}")
        check_lane(lane, "lane")
        self.spec = ClusterSpec({})
        self.servers: list[Server] = []
        self._num_ps, self._num_workers = ps, workers
        self._lane, self._grace = lane, grace
        self._token = environment.read().token if token is None else token
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # Bound before the servers are made, because each server gets a cluster with all addresses.
            sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(self._num_ps)]
            self.spec = self._cluster([sock.getsockname()[1] for sock in sockets])
            for index, sock in enumerate(sockets):
                self.servers.append(self._serve(index, sock))
                stack.callback(self.servers[-1].stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self.servers = []

    @property
    def tasks(self) -> list[TaskId]:
        """The chief and the workers."""
        return [*self.spec.tasks(Role.CHIEF), *self.spec.tasks(Role.WORKER)]

    def client(self, task: str | TaskId) -> ParameterClient:
        """Return a new client of a worker, such as ``worker:0``, as if of a process that was just started.

        Blocks until it is connected; closed with the cluster.

        Raises:
            ValueError: If the text does not name a task.
            ParameterServerError: If the ps tasks refuse the client.
        """
        client = connection.to_cluster(
            self.spec,
            TaskId.parse(str(task)),
            CONNECT_TIMEOUT,
            token=self._token,
            lane=self._lane,
            process=new_process(),
        )
        self._stack.callback(client.close)
        return client

    def resolver(self, task: str | TaskId) -> SimpleClusterResolver:
        """Return a resolver that makes a strategy of this process a task of this cluster."""
        role, index = TaskId.parse(str(task))
        return SimpleClusterResolver(self.spec, task_type=role, task_id=index)

    def tf_config(self, task: str | TaskId) -> str:
        """Return TF_CONFIG for a task."""
        return as_tf_config(self.spec, TaskId.parse(str(task)))

    def environment(self, task: str | TaskId) -> dict[str, str]:
        """Return the environment variables that make a process a task of this cluster."""
        return {
            "TF_CONFIG": self.tf_config(task),
            "PARAMSERVER_TOKEN": self._token,
            "PARAMSERVER_LANE": self._lane,
        }

    def __repr__(self) -> str:
        return f"<LocalCluster of {len(self.servers)} ps and {self._num_workers} workers: {self.servers}>"

    def _cluster(self, ports: list[int]) -> ClusterSpec:
        return ClusterSpec(
            {
                Role.CHIEF: [f"{HOST}:0"],
                Role.WORKER: [f"{HOST}:0"] * (self._num_workers - 1),
                Role.PS: [f"{HOST}:{port}" for port in ports],
            }
        )

    def _serve(self, index: int, listening: socket.socket) -> Server:
        return Server(self.spec, Role.PS, index, token=self._token, grace=self._grace, descriptor=listening.detach())
