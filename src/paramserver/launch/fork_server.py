"""Tasks as forks of one process that has imported torch, like the children of multiprocessing's ``forkserver``.

Importing torch takes a core for seconds: for all tasks of a run at once, and for a restarted task while the others wait
for it. A fork takes milliseconds, and shares the memory of all that was imported.

The forking process is a child of the launcher, or one to which the launcher has inherited a connection. It receives
orders through a socket, one at a time, and ends when the launcher is gone:

    Fork    become a task, with the descriptors in the same message    -> the id of the new process, or -errno
    Await   wait for the end of a process, which is not reaped         -> its exit code or signal

It has no thread of its own when it forks, except for those of libraries that handle forks (OpenBLAS).

The launcher's side is in this file, and imports no torch; the other side is the function `main`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import random
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from paramserver.cluster import environment
from paramserver.errors import ConfigError
from paramserver.launch.guard import announce
from paramserver.launch.lifecycle import Ending
from paramserver.launch.start_methods import Descriptors, Program, StartMethod, as_text, ending, task_environment

Answer = TypeVar("Answer")

ORDER_BYTES = 1 << 18
MOST_DESCRIPTORS = 8
READY = b"ready"
STDIN, STDOUT, STDERR = range(3)


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Order to become a task. Comes with descriptors for stdin, stdout, stderr, the guard, and those of ``inherited``.

    Attributes:
        name: The name of the process in lists of processes.
        module: The module to run as with ``python -m``.
        arguments: The arguments of the module.
        folder: The working directory.
        env: Additions to the environment.
        inherited: Names of the environment variables for the numbers of the other descriptors.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    folder: str
    env: dict[str, str]
    inherited: tuple[str, ...]


class Await(msgspec.Struct, frozen=True, tag=True):
    """Order to report the end of the process ``pid``, once it has ended."""

    pid: int


class ForkServer(StartMethod):
    """Starts each process as a fork of an existing one.

    Args:
        connection: A connection to that process, which must be ready; owned by this object from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def start(self, program: Program, descriptors: Descriptors) -> int:
        _, _, module, *arguments = program.command  # PYTHON -m MODULE ARGUMENTS...
        inherited = descriptors.inherited
        order = Fork(program.name, module, tuple(arguments), str(Path.cwd()), dict(program.env), tuple(inherited))
        stdin = self._nothing if descriptors.stdin is None else descriptors.stdin
        standard = (stdin, descriptors.stdout, descriptors.stderr)
        pid = self._ask(order, [*standard, self._guard.fileno(), *inherited.values()], int)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid

    def ending(self, pid: int) -> Ending:
        return self._ask(Await(pid), [], Ending)

    def _reap(self) -> None:
        os.close(self._nothing)
        self._connection.close()  # ends the server; the system then reaps the processes that it has forked

    def _ask(self, order: Fork | Await, descriptors: Sequence[int], kind: type[Answer]) -> Answer:
        try:
            socket.send_fds(self._connection, [msgspec.json.encode(order)], descriptors)
            answer = self._connection.recv(ORDER_BYTES)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        if not answer:
            raise self._failure()
        return msgspec.json.decode(answer, type=kind)

    def _failure(self) -> ConfigError:
        return ConfigError("launch: the process that the tasks are forked from, which this one inherited, has ended")


class OwnForkServer(ForkServer):
    """A fork server that is started here, and ends with this object.

    Args:
        python: The interpreter.
        env: The common environment of all tasks, including all variables that are read when a program starts.
        preload: The modules to import before forking.

    Raises:
        ConfigError: If the interpreter cannot be started.
    """

    def __init__(self, python: str, env: Mapping[str, str], preload: Sequence[str]) -> None:
        connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(connection)
        self.ready = connection.fileno()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    (python, "-m", __name__, *preload),
                    stdin=subprocess.DEVNULL,
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    env=task_environment(env),
                    start_new_session=True,
                    preexec_fn=self._guard.enter,
                )
        except OSError as exc:
            self._guard.close()
            super()._reap()
            raise ConfigError(f"start of the tasks failed: {python}: {exc.strerror}") from exc

    def make_ready(self) -> None:
        if self._connection.recv(len(READY)) != READY:
            raise self._failure()

    def _reap(self) -> None:
        self._process.kill()
        self._process.wait()
        super()._reap()

    def _failure(self) -> ConfigError:
        return ConfigError(
            "launch: the process that the tasks are forked from, which imports torch for all of them, ended with code "
            f"{self._process.wait()}; does `python -c 'import torch'` work here? --start-method spawn does without it"
        )


def inherited_fork_server() -> ForkServer | None:
    """Return the fork server that the environment names; None if it names none."""
    descriptor = environment.read().fork_server_fd
    return None if descriptor is None else ForkServer(socket.socket(fileno=os.dup(descriptor)))


def main(preload: Sequence[str]) -> None:
    """Obey orders, which come through stdout, until the launcher is gone, or become a task."""
    with socket.socket(fileno=os.dup(STDOUT)) as launcher:
        os.dup2(STDIN, STDOUT)  # the output of imported modules is dropped
        imported = _preload(preload)
        if len(imported) < len(preload):
            os.dup2(launcher.fileno(), STDOUT)
            _begin_again(imported)
        launcher.send(READY)
        task = _obey(launcher)
    if task is None:
        os._exit(0)  # without exit handlers, which would take longer than most tasks take to begin
    runpy.run_module(task, run_name="__main__", alter_sys=True)


def _preload(names: Sequence[str]) -> list[str]:
    """Import modules up to the first that fails; return those that were imported."""
    imported: list[str] = []
    with contextlib.suppress(Exception):  # a task that imports the module gets the error, and reports it
        for name in names:
            importlib.import_module(name)
            imported.append(name)
    gc.collect()
    gc.freeze()  # the tasks' garbage collections then skip these objects, and do not copy their memory
    return imported


def _begin_again(preload: Sequence[str]) -> NoReturn:
    """Become a fork server that has not tried to import anything else.

    A module that was imported in part may fail in another way the next time, which would hide its own error: what it
    has registered before the failure is registered still.
    """
    assert __spec__ is not None  # noqa: S101  # it was started with -m
    os.execv(sys.executable, (sys.executable, "-m", __spec__.name, *preload))  # noqa: S606  # our own program


def _obey(launcher: socket.socket) -> str | None:
    """Obey orders; return the module of a task to go on with in a forked process, and None otherwise."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(launcher, ORDER_BYTES, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return None
        order = msgspec.json.decode(data, type=Fork | Await)
        if isinstance(order, Await):
            info = os.waitid(os.P_PID, order.pid, os.WEXITED | os.WNOWAIT)
            launcher.send(msgspec.json.encode(ending(info)))
            continue
        pid = _fork()
        if pid == 0:
            _become(order, descriptors)
            return order.module
        launcher.send(msgspec.json.encode(pid))
        for number in descriptors:
            os.close(number)


def _fork() -> int:
    """Fork as ``os.fork`` does, but return -errno if the system refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about threads; see the top of the file
            return os.fork()
    except OSError as error:
        return -(error.errno or 1)


def _become(order: Fork, descriptors: Sequence[int]) -> None:
    """Turn this process, which was just forked, into one that seems to have been started as a program."""
    stdin, stdout, stderr, guard, *inherited = descriptors
    os.setsid()
    announce(guard)
    os.chdir(order.folder)
    for number, standard in ((stdin, STDIN), (stdout, STDOUT), (stderr, STDERR)):
        os.dup2(number, standard)
        os.close(number)
    os.close(guard)
    environment.extend({**order.env, **as_text(dict(zip(order.inherited, inherited, strict=True)))})
    Path("/proc/self/comm").write_text(order.name)
    if _leaks_are_reported():
        atexit.register(gc.unfreeze)
    sys.argv[1:] = order.arguments
    _reseed()


def _leaks_are_reported() -> bool:
    """Return whether a library was imported that reports all of its objects that are left at the end of a process.

    All extension modules made with nanobind do, such as Triton's, and would count frozen objects, which the interpreter
    does not free.
    """
    return any(each.__module__ == "nanobind" for each in type.__subclasses__(type))


def _reseed() -> None:
    """Seed the random number generators anew, so that tasks differ as if each had imported the libraries itself."""
    random.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


if __name__ == "__main__":
    main(sys.argv[1:])
