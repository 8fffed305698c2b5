"""One task on a node of Ray: what its actor holds. The driver calls the methods, several at a time.

Rules
    * `events` blocks until something has happened, and the driver calls it again and again. All other methods return at
      once, on threads of their own.
    * The cluster of a task is a file that is replaced as a whole at every change, so that a reader finds the old or the
      new one.
    * A process ends with its actor: a guard kills its group when the actor's process is gone, whatever ends that.
    * This file does not import Ray, except to ask for the address of the node.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import msgspec

from paramserver.cluster import environment
from paramserver.cluster.report import Report, decode
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Ending
from paramserver.launch.output import LineBuffer, OutputLine
from paramserver.launch.process import TaskProcess
from paramserver.launch.spec import TaskSpec
from paramserver.launch.start_methods import Spawn

Event: TypeAlias = OutputLine | Report | Ending
"""Something that has happened in a task; its end is the last one."""

LINGER = 1.0
"""Seconds that processes which the task has started get to end their output."""
BACKLOG = 128
READ_BYTES = 65536

FILE_VARIABLE = "PARAMSERVER_TF_CONFIG_FILE"
CALLS_AT_ONCE = 8
"""Number of calls that an actor takes at a time: one for `events` or a function, the others for what is quick."""


class TaskHost:
    """A task of a run, at first without a process.

    Args:
        task: The task.
        env: Additions to the environment of its process.
        host: The address of the node; by default the one that Ray knows it by.
    """

    def __init__(self, task: TaskId, env: Mapping[str, str], host: str | None = None) -> None:
        environment.drop(["TF_CONFIG"])  # it would be read instead of the file
        self._task = task
        self._host = _node_address() if host is None else host
        self._folder = tempfile.TemporaryDirectory(prefix="paramserver-")
        folder = Path(self._folder.name)
        self._cluster_file, self._run_file = folder / "tf-config.json", folder / "running"
        self._run_file.touch()
        self._env = {**env, FILE_VARIABLE: str(self._cluster_file), "PARAMSERVER_RUN_FILE": str(self._run_file)}
        self._listener: socket.socket | None = None
        self._process: TaskProcess | None = None
        self._method: Spawn | None = None
        self._ending: Ending | None = None
        self._give_up: float | None = None
        self._selector = selectors.DefaultSelector()
        self._open_pipes = 0

    def __repr__(self) -> str:
        return f"<TaskHost {self._task} on {self._host}>"

    def listen(self) -> str:
        """Return the address of the task: that of a socket that listens, if it is a ps, and else that of the node."""
        if self._task.role is not Role.PS:
            return self._host
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.create_server((self._host, 0), family=family, backlog=BACKLOG)
        host = f"[{self._host}]" if family == socket.AF_INET6 else self._host
        return f"{host}:{self._listener.getsockname()[1]}"

    def update(self, tf_config: str) -> None:
        """Replace the content of the file with the cluster."""
        new = self._cluster_file.with_suffix(".new")
        new.write_text(tf_config, encoding="utf-8")
        new.replace(self._cluster_file)

    def end_run(self) -> None:
        """Let the task know that the run is over, should it look for the ps tasks in vain."""
        self._run_file.unlink(missing_ok=True)

    def start(self, arguments: tuple[str, ...], tf_config: str, folder: str | None, reports: bool) -> None:
        """Start the process.

        Args:
            arguments: The arguments of the interpreter.
            tf_config: The cluster at the moment.
            folder: The folder to start in; None for that of the actor.
            reports: Whether the task is asked for reports.

        Raises:
            ConfigError: If this node has no such folder, or the process cannot be started.
        """
        self.enter(folder)
        self.update(tf_config)
        spec = TaskSpec(self._task, (sys.executable, *arguments), self._env)
        self._method = Spawn()
        self._process = process = TaskProcess(spec, self._listener, reports, self._method)
        if self._listener is not None:
            self._listener.close()  # or else connections to a dead ps would wait here
        self._selector.register(process.pidfd, selectors.EVENT_READ, partial(self._end, process))
        for descriptor, is_error in ((process.stdout, False), (process.stderr, True)):
            self._watch(descriptor, partial(_as_line, self._task, is_error))
        if process.reports is not None:
            self._watch(process.reports, _as_report)

    def events(self) -> list[Event]:
        """Return what has happened since the last call. Blocks until something has; not to be called after the end."""
        found: list[Event] = []
        while not found:
            timeout = None if self._give_up is None else max(0.0, self._give_up - time.monotonic())
            ready = self._selector.select(timeout)
            for key, _ in ready:
                found += key.data()
            if self._ending is not None and (not self._open_pipes or not ready):
                found.append(self._ending)
                self.close()
        return found

    def forward(self) -> int:
        """Print the lines of the process, where Ray collects them, until it has ended; return its exit code."""
        while True:
            for event in self.events():
                if isinstance(event, OutputLine):
                    stream = sys.stderr if event.is_error else sys.stdout
                    stream.write(f"{event.task} | {event.text}\n")
                    stream.flush()
                elif isinstance(event, Ending):
                    return event.code

    def send(self, number: int) -> None:
        """Send a signal to the process, or SIGKILL to its group; does nothing before its start or after its end."""
        if self._process is None or self._ending is not None:
            return
        if number == signal.SIGKILL:
            self._process.kill()
        else:
            self._process.send(signal.Signals(number))

    def close(self) -> None:
        """End what the process has started, and remove the files. `events` calls it at the end of the process."""
        if self._process is not None and self._method is not None:
            self._process.kill()  # what the process has started
            self._method.close()
            self._process.close()
        self._selector.close()
        self._folder.cleanup()

    def enter(self, folder: str | None) -> None:
        """Make a folder the current one.

        Raises:
            ConfigError: If this node does not have it.
        """
        if folder is None:
            return
        try:
            os.chdir(folder)
        except OSError as error:
            raise ConfigError(
                f"{self._task}: node {self._host} has no folder {folder}, in which the launcher runs "
                f"({error.strerror}); put it on all nodes, or have it copied: --working-dir ."
            ) from error

    def _watch(self, descriptor: int, convert: Callable[[bytes], list[Event]]) -> None:
        read = partial(self._read, descriptor, LineBuffer(), convert)
        self._selector.register(descriptor, selectors.EVENT_READ, read)
        self._open_pipes += 1

    def _read(self, descriptor: int, buffer: LineBuffer, convert: Callable[[bytes], list[Event]]) -> list[Event]:
        data = os.read(descriptor, READ_BYTES)
        if not data:
            self._selector.unregister(descriptor)
            self._open_pipes -= 1
        return [event for line in (buffer.feed(data) if data else buffer.finish()) for event in convert(line)]

    def _end(self, process: TaskProcess) -> list[Event]:
        self._selector.unregister(process.pidfd)
        self._ending = process.ending()
        self._give_up = time.monotonic() + LINGER
        return []


class FunctionHost(TaskHost):
    """A task that is a function, which runs in the actor itself."""

    def run(
        self,
        function: Callable[..., object],
        args: tuple[object, ...],
        tf_config: str,
    ) -> object:
        """Call a function as this task, and return its result.

        The cluster is in the environment of this process meanwhile. `listen` has been called before, so that the
        environment is there when the function's modules are imported.
        """
        self.update(tf_config)
        try:
            return call_and_leave(function, *args)
        except BaseException as error:
            sys.last_value = error  # read by exit handlers, which tell the ps tasks
            raise

    def listen(self) -> str:
        environment.extend(self._env)
        return super().listen()


def call_and_leave(function: Callable[..., object], *args: object) -> object:
    """Call a function, and let go of its strategies, which then say goodbye to the ps tasks; return its result."""
    result = function(*args)
    gc.collect()  # models and strategies refer to each other
    return result


def _as_line(task: TaskId, is_error: bool, line: bytes) -> list[Event]:
    return [OutputLine(task, line.decode("utf-8", "replace"), is_error)]


def _as_report(line: bytes) -> list[Event]:
    # Any process that the user's script starts may write into this pipe; lines that are not reports are ignored.
    with contextlib.suppress(msgspec.DecodeError):
        return [decode(line)]
    return []


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
