"""The ps task: message -> store -> reply. The only room where transport meets store."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import torch

from paramserver.cluster import ClusterSpec, Role, TaskId, environment, server_task
from paramserver.cluster.addresses import check_addresses
from paramserver.cluster.report import Reporter
from paramserver.cluster.task import ALONE
from paramserver.errors import ConfigError, ParameterServerError, UnavailableError
from paramserver.memory import arena_memory, heap
from paramserver.server.connection import Conversation, Host
from paramserver.server.handler import RequestHandler
from paramserver.server.models import Models
from paramserver.server.threads import ServingThreads
from paramserver.server.watch import Watch
from paramserver.store.liveness import Liveness
from paramserver.store.membership import Membership, Outlook
from paramserver.store.store import Store
from paramserver.transport.complaints import Complaints
from paramserver.transport.identity import Identity, new_incarnation
from paramserver.transport.in_process import InProcessLane, InProcessSession
from paramserver.transport.listener import Listener
from paramserver.transport.reception import Reception
from paramserver.wire import messages

logger = logging.getLogger(__name__)

GRACE = 60.0
"""Seconds that a ps, when all others are done, waits for workers that it never saw and for a chief that was lost."""
RECONNECTION = 2.0
"""Seconds in which a worker that is about to come back does so."""
REPORT_INTERVAL = 0.5
SIGNAL_INTERVAL = 0.5
"""Seconds until a signal has its effect at the latest."""


class Server:
    """One ps task of a cluster: listens, serves, and ends with the run.

    Args:
        cluster_spec: The cluster: a ClusterSpec, or anything that one is made from. At port 0 the system picks a port
            for this task, which `target` tells.
        job_name: The role of this task; may be omitted where the cluster has one job.
        task_index: The index of this task; may be omitted where the job has one task.
        start: Whether to serve at once.
        token: The secret of the run; by default the environment's ``PARAMSERVER_TOKEN``, or the content of
            ``PARAMSERVER_TOKEN_FILE``. Without one, only a loopback address is listened on.
        insecure: Whether to listen on any address even without a token; by default whether ``PARAMSERVER_INSECURE=1``.
        grace: Seconds to wait for workers that were never seen, and for a chief that was lost.
        descriptor: A listening socket to take over, instead of binding the task's address; by default the
            environment's ``PARAMSERVER_LISTEN_FD``.

    Raises:
        ValueError: If the task is not in the cluster, its role is not ps, or an address is malformed.
        TypeError: If ``cluster_spec`` does not describe a cluster.
        AddressError: If the address is taken.
        ConfigError: If other hosts could reach this task, and there is no token.
    """

    def __init__(
        self,
        cluster_spec: object,
        job_name: str | None = None,
        task_index: int | None = None,
        *,
        start: bool = True,
        token: str | None = None,
        insecure: bool = False,
        grace: float = GRACE,
        descriptor: int | None = None,
    ) -> None:
        self.cluster_spec = ClusterSpec(cluster_spec)  # type: ignore[arg-type]  # checked there
        check_addresses(self.cluster_spec, "Server: cluster", least_ps_port=0)
        self.task = _which_task(self.cluster_spec, job_name, task_index)
        surroundings = environment.read()
        self._grace = grace
        workers = [str(task) for role in (Role.CHIEF, Role.WORKER) for task in self.cluster_spec.tasks(role)]
        is_one_view = self.cluster_spec.is_one_view
        if is_one_view and not workers:
            workers = [str(TaskId(Role.WORKER, 0))]  # the chief, as there is no other
        self._membership = Membership(workers[0] if workers else "", workers, takes_more=is_one_view)
        complaints = Complaints(logger.warning)
        self._models = Models(str(self.task), arena_memory.shared_store_memory, self._membership, complaints)
        inherited = surroundings.listen_fd if descriptor is None else descriptor
        self._listener = Listener(self.cluster_spec.address(self.task), str(self.task), inherited)
        token = surroundings.token if token is None else token
        if self._listener.is_exposed and not token:
            self._admit_strangers(insecure or surroundings.insecure)
        # Daemon threads: a program that fails before it has stopped its server must still be able to exit.
        self._acceptor = threading.Thread(target=self._accept, name=f"{self.task} accepts", daemon=True)
        self._threads = ServingThreads(f"{self.task} serves")
        hang_up = partial(_hang_up, self._threads)  # no method, which would keep the server
        self._host = Host(
            me=Identity(task=str(self.task), token=token, incarnation=new_incarnation()),
            membership=self._membership,
            models=self._models,
            complaints=complaints,
            liveness=Liveness(time.monotonic),
            hang_up=hang_up,
        )
        self._watch = Watch(str(self.task), self._membership, self._host.liveness, hang_up)
        self._waiters: list[threading.Thread] = []  # those that an interrupt of `join` has left behind
        if start:
            self.start()

    @classmethod
    def create_local_server(cls, *, start: bool = True) -> Server:
        """Return a server for one chief on this machine, at a port that the system picks; `target` is its address."""
        return cls({"chief": ["127.0.0.1:0"], "ps": ["127.0.0.1:0"]}, "ps", 0, start=start)

    @property
    def target(self) -> str:
        """Address of this server, ``host:port``."""
        host = self.cluster_spec.address(self.task).rpartition(":")[0]
        return f"{host}:{self._listener.port}"

    def start(self) -> None:
        """Begin to serve, on threads of its own. Idempotent; a stopped server stays stopped."""
        if not self._acceptor.ident and not self._listener.is_closed:
            heap.keep_for_steps()
            self._acceptor.start()
            self._watch.start()

    def join(self) -> None:
        """Serve until the run is over. Blocks, forever if no run comes to an end.

        Raises:
            UnavailableError: If the chief was lost and did not come back.
            ParameterServerError: If the chief failed.
        """
        self.start()
        complete = self._await_over()
        was_stopped = self._listener.is_closed
        self.stop()
        self._models.check_alive()
        if not complete and not was_stopped:
            raise UnavailableError(
                f"{self._membership.chief} was lost and did not come back within {self._grace:g} s; "
                f"{self.task} ends, restart the run to go on from its last checkpoint",
                self._membership.chief,
            )

    def _await_over(self) -> bool:
        """Wait as `Membership.await_over` does, on another thread.

        A signal handler runs in the middle of the main thread's work, so `request_stop` could come between the main
        thread's look at the state and its wait for a change, and would be missed.
        """
        results: list[bool] = []
        waiter = threading.Thread(
            target=lambda: results.append(self._membership.await_over(self._grace)),
            name=f"{self.task} waits",
            daemon=True,
        )
        self._waiters.append(waiter)
        waiter.start()
        while waiter.is_alive():
            # A signal that another thread of this process received does not end the main thread's wait for a lock.
            waiter.join(SIGNAL_INTERVAL)
        return results[0]

    def stop(self) -> None:
        """End now: close every connection and wait for the threads. Idempotent."""
        self.request_stop()
        self._models.close()
        if self._acceptor.ident:
            self._acceptor.join()
        for waiter in self._waiters:
            waiter.join()
        self._watch.stop()
        self._listener.release()
        self._threads.stop()

    def request_stop(self) -> None:
        """Let `join` end soon. Does not block, so that a signal handler may call it."""
        self._listener.close()
        self._membership.stop()

    def await_alone(self, timeout: float) -> None:
        """Wait until no worker is connected for a while, or the server is stopped, for ``timeout`` seconds at most."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            self._membership.await_alone("", left)
            # A chief whose step was interrupted connects anew before it saves.
            if not self._membership.await_company(min(RECONNECTION, left)):
                return

    @property
    def is_over(self) -> bool:
        """Whether the run is over: the chief and all other workers have finished or are gone."""
        return self._membership.outlook is Outlook.OVER

    def status(self) -> messages.Status:
        """Return the contents and counters of this ps."""
        return self._models.status()

    def __repr__(self) -> str:
        return f"<Server {self.task} at {self.target}: {self._models!r}>"

    def _admit_strangers(self, insecure: bool) -> None:
        """Check that every peer on the network may take part in the run, since there is no token."""
        if not insecure:
            self._listener.release()
            raise ConfigError(
                f"{self.task} has no token: everyone who reaches {self.target} could read and change the model; set "
                "PARAMSERVER_TOKEN or PARAMSERVER_TOKEN_FILE to the same secret for all tasks of the run, let the ps "
                "listen on 127.0.0.1, or accept this with --insecure (PARAMSERVER_INSECURE=1)"
            )
        logger.warning("%s has no token: everyone who reaches %s can read and change the model", self.task, self.target)

    def _accept(self) -> None:
        for guest in Reception(self._listener, self._host.me, self._turn_away).guests():
            try:
                self._threads.add(Conversation(guest, self._host))
            except Exception as error:  # noqa: BLE001  # no thread could be started: the next one may have more luck
                guest.connection.close()
                self._turn_away(error)

    def _turn_away(self, error: Exception) -> None:
        """Note why a connection was not accepted."""
        if isinstance(error, UnavailableError):  # also a worker that goes on by the local socket instead
            logger.debug("%s: %s", self.task, str(error))
        elif isinstance(error, ParameterServerError):
            self._host.complaints.add(type(error).__name__, f"{self.task} turned away a connection: {error}")
        else:  # most likely no descriptor, thread or memory is left; connections that end will free some
            what = f"{self.task} cannot take another connection: {type(error).__name__}: {error}"
            self._host.complaints.add(type(error).__name__, f"{what}; raise the limit (ulimit -n, ulimit -u)?")


def run_standard_server(*, insecure: bool = False) -> None:
    """Serve as the ps task that TF_CONFIG names until the run is over. Blocks.

    SIGTERM and SIGINT end it early, with the requests that are under way. With ``PARAMSERVER_LINGER`` it goes on until
    no worker is connected, for so many seconds at most; a second signal ends it at once. Main thread only.

    Args:
        insecure: As in `Server`.

    Raises:
        SystemExit: With code 128 + N after signal N, unless the run was over already.
        ValueError: If TF_CONFIG does not name a ps task of a cluster, or there is no token and other hosts could reach
            this task.
        AddressError: If the address is taken.
        UnavailableError: If the chief was lost and did not come back.
        ParameterServerError: If the chief failed.
    """
    cluster, task = server_task()
    server = Server(cluster, task.role, task.index, insecure=insecure)
    with report_progress(server), _stopped_by_signals(server, environment.read().linger) as received:
        logger.info("%s serves at %s", server.task, server.target)
        server.join()
    if received and not server.is_over:
        code = 128 + received[0]
        name, step = signal.Signals(received[0]).name, server.status().global_step
        logger.warning("%s leaves at step %d, before the run is over (%s)", server.task, step, name)
        raise SystemExit(code)


@contextlib.contextmanager
def _stopped_by_signals(server: Server, linger: float) -> Iterator[list[int]]:
    """Provide a list of the signals that have asked the server to leave."""
    received: list[int] = []
    asked = threading.Event()

    def stop_when_alone() -> None:
        asked.wait()
        server.await_alone(linger)
        server.request_stop()

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if linger and len(received) == 1:
            asked.set()
        else:
            server.request_stop()

    thread = threading.Thread(target=stop_when_alone, name=f"{server.task} lingers")
    if linger:
        thread.start()
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        server.request_stop()
        asked.set()
        if thread.ident:
            thread.join()


def play_in_process(device: torch.device | str = "cpu", index: int = 0) -> Callable[[], InProcessLane]:
    """Return a function that connects to a ps inside this process, for a run without a cluster.

    Every returned lane leads to the same store, by function calls, as the same incarnation of the worker.

    Args:
        device: Device for the variables.
        index: Index of the ps.
    """
    task = str(TaskId(Role.PS, index))
    me = str(ALONE)
    membership = Membership(me, [me])
    store, incarnation = Store(task, partial(arena_memory.private_store_memory, device=device)), new_incarnation()
    handler = RequestHandler(store, membership)
    return lambda: InProcessLane(task, InProcessSession(me, incarnation), handler.handle)


@contextlib.contextmanager
def report_progress(server: Server) -> Iterator[None]:
    """Report the server's state to the launcher, if there is one, every `REPORT_INTERVAL` seconds and at the end."""
    reporter = Reporter(str(server.task), environment.read().report_fd)
    over = threading.Event()

    def tell(state: str) -> None:
        status = server.status()
        reporter.tell(
            state=state,
            global_step=status.global_step,
            updates=status.updates,
            mean_staleness=status.mean_staleness,
            largest_staleness=status.largest_staleness,
        )

    def keep_telling() -> None:
        tell("serving")
        while not over.wait(REPORT_INTERVAL):
            tell("serving")

    thread = threading.Thread(target=keep_telling, name=f"{server.task} reports")
    if reporter.is_on:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident:
            thread.join()
        tell("done")


def _hang_up(threads: ServingThreads, incarnation: str) -> None:
    """End all connections of an incarnation."""
    threads.hang_up(lambda served: isinstance(served, Conversation) and served.incarnation == incarnation)


def _which_task(cluster: ClusterSpec, job_name: str | None, task_index: int | None) -> TaskId:
    if job_name is None:
        if len(cluster.jobs) != 1:
            raise ConfigError(f"a server for one of the jobs {cluster.jobs} needs an explicit job_name")
        job_name = cluster.jobs[0]
    if task_index is None:
        if cluster.num_tasks(job_name) != 1:
            raise ConfigError(
                f"a server for one of the {cluster.num_tasks(job_name)} tasks of {job_name!r} "
                "needs an explicit task_index"
            )
        task_index = cluster.task_indices(job_name)[0]
    if job_name != Role.PS:
        raise ConfigError(f"{job_name}:{task_index} cannot serve: only ps tasks listen, all others connect to them")
    cluster.task_address(job_name, task_index)
    return TaskId(Role.PS, task_index)
