"""A cluster of Ray, as far as a launch needs it: the connection, the placement group, actors, and calls to them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import queue
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from paramserver.cluster.addresses import parse_address
from paramserver.cluster.task import TaskId
from paramserver.errors import ConfigError
from paramserver.launch.ray_host import CALLS_AT_ONCE, FunctionHost, TaskHost
from paramserver.launch.ray_options import AUTO_ADDRESS, RayOptions
from paramserver.launch.ray_spec import ActorSpec, Node, RaySpec

Actor: TypeAlias = Any
"""A handle of an actor, whose methods Ray makes at run time."""
Call: TypeAlias = Any
"""A call to an actor that is under way: an ObjectRef."""

REACH_TIMEOUT = 5.0
"""Seconds in which the address of a cluster has to accept a connection. Ray itself would try for a minute."""


def import_ray() -> Any:
    """Return the module of Ray.

    Raises:
        ConfigError: If it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('launch --on ray: Ray is not installed; install it: pip install "paramserver[ray]"')
    return importlib.import_module("ray")


@contextlib.contextmanager
def connected(options: RayOptions, *, shows_output: bool) -> Iterator[None]:
    """Connect this process to a cluster, unless it is connected already.

    Args:
        options: The options of Ray.
        shows_output: Whether Ray itself shows the output of actors.

    Raises:
        ConfigError: If there is no cluster at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    if options.address != AUTO_ADDRESS:
        _reach(options.address)
    try:
        ray.init(
            address=options.address,
            log_to_driver=shows_output,
            logging_level=logging.ERROR,
            runtime_env=_runtime_env(options.working_dir),
        )
    except ConnectionError as error:
        raise _no_cluster(options.address, str(error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """Return the nodes that are up."""
    return [Node(node["NodeManagerAddress"], node["Resources"]) for node in import_ray().nodes() if node["Alive"]]


def place(spec: RaySpec) -> Any:
    """Ask for the placement group of a run, and return it; its ``ready()`` is a call that ends when it is placed."""
    from ray.util.placement_group import placement_group

    return placement_group(spec.bundles, strategy=spec.options.placement, name=spec.name)


def remove(group: Any) -> None:
    """Remove a placement group, and with it all actors on it."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def start_actor(spec: ActorSpec, group: Any, bundle: int, name: str, *, runs_function: bool) -> Actor:
    """Start the actor of a task on its bundle, and return its handle. Does not wait for it."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    others = {name: amount for name, amount in spec.bundle.items() if name not in ("CPU", "GPU", "memory")}
    return (
        import_ray()
        .remote(FunctionHost if runs_function else TaskHost)
        .options(
            num_cpus=spec.bundle.get("CPU", 0),
            num_gpus=spec.bundle.get("GPU", 0),
            memory=spec.bundle.get("memory"),
            resources=others,
            name=name,
            max_concurrency=CALLS_AT_ONCE,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
        )
        .remote(spec.task, spec.env)
    )


def kill(actor: Actor) -> None:
    """Kill an actor, and with it the process that it holds. Idempotent."""
    import_ray().kill(actor)


def is_gone(error: BaseException) -> bool:
    """Return whether an error of a call says that the actor is gone, or cannot be reached."""
    return isinstance(error, import_ray().exceptions.RayActorError)


def cause_of(error: BaseException) -> BaseException:
    """Return the error that a method of an actor has raised, for the error of the call."""
    return getattr(error, "cause", None) or error


class Calls:
    """Calls to actors whose results are handled by the loop of the launcher, on its own thread.

    A byte can be read from it when `handle` has something to do.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._reader.fileno()

    def when_done(self, call: Call, handle: Callable[[Any], None], fail: Callable[[BaseException], None]) -> None:
        """Let a function take the result of a call, or another one its error."""
        call.future().add_done_callback(partial(self._arrive, handle, fail))

    def handle(self) -> None:
        """Hand over all results that have arrived. Does not block."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(65536)
        with contextlib.suppress(queue.Empty):
            while True:
                self._done.get_nowait()()

    def close(self) -> None:
        """Close both descriptors. Results that arrive later are dropped."""
        self._reader.close()
        self._writer.close()

    def _arrive(
        self, handle: Callable[[Any], None], fail: Callable[[BaseException], None], future: Future[Any]
    ) -> None:
        """Take a result on a thread of Ray's."""
        error = future.exception()
        self._done.put(partial(handle, future.result()) if error is None else partial(fail, error))
        with contextlib.suppress(OSError):  # it is full, so that the loop is awake; or closed
            self._writer.send(b"\0")


def actor_name(spec: RaySpec, task: TaskId, attempt: int) -> str:
    """Return the name of an actor, as the tools of Ray show it; names of one namespace are never used twice."""
    return f"{spec.name}/{task}" + (f"/{attempt}" if attempt else "")


def _reach(address: str) -> None:
    host, port = parse_address(address, "--address")
    try:
        socket.create_connection((host, port), REACH_TIMEOUT).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"launch --on ray: there is no cluster of Ray at {address!r} ({why.splitlines()[0]}); start one (ray start "
        "--head), or name its address (--address host:6379, or RAY_ADDRESS)"
    )


def _runtime_env(working_dir: Path | None) -> Mapping[str, str] | None:
    return None if working_dir is None else {"working_dir": str(working_dir)}
