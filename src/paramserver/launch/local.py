"""A run as processes on this machine, watched by one loop that waits for the next event."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from paramserver.cluster import environment
from paramserver.cluster.report import Report, decode
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.cores import usable_cores
from paramserver.launch.fork_server import OwnForkServer, inherited_fork_server
from paramserver.launch.lifecycle import Ending, Lifecycle
from paramserver.launch.output import LineBuffer, OutputLine, Printer
from paramserver.launch.process import TaskProcess
from paramserver.launch.spec import HOST, LEFT_ALONE, LaunchOptions, LaunchSpec, describe, plan, shared_environment
from paramserver.launch.start_methods import Spawn, StartMethod
from paramserver.layout.lanes import check_platform

LINGER = 1.0
"""Seconds that helper processes, such as multiprocessing's resource tracker, get after all tasks have ended."""

BACKLOG = 128
"""Number of connections that may wait for a ps that is still starting."""

READ_BYTES = 65536

OnReport = Callable[[Report], None]
OnOutput = Callable[[OutputLine], None]
OnEnd = Callable[[TaskId, Ending], None]


def launch(
    options: LaunchOptions,
    on_report: OnReport | None = None,
    on_output: OnOutput | None = None,
    on_end: OnEnd | None = None,
) -> int:
    """Run what ``options`` ask for on this machine, wait for its end, and return the exit code.

    The other arguments are those of `run`.

    Raises:
        ConfigError: If a task cannot be started, or this system is not Linux.
    """
    check_platform("launch")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_listener()) for _ in range(options.ps)]
        ports = [sock.getsockname()[1] for sock in sockets]
        spec = _plan(options, ports, secrets.token_hex(16), secrets.token_hex(4))
        listeners = {TaskId(Role.PS, index): sock for index, sock in enumerate(sockets)}
        return run(spec, on_report, on_output, listeners, on_end)


def dry_run(options: LaunchOptions) -> str:
    """Return a description of what `launch` would start. Binds and starts nothing."""
    return describe(_plan(options, [None] * options.ps, "***", "<run id>"))


def run(
    spec: LaunchSpec,
    on_report: OnReport | None = None,
    on_output: OnOutput | None = None,
    listeners: Mapping[TaskId, socket.socket] | None = None,
    on_end: OnEnd | None = None,
) -> int:
    """Start the tasks of ``spec``, wait for the end of the run, and leave no process behind.

    Runs in the main thread only, because it takes over SIGINT and SIGTERM while it runs.

    Args:
        spec: The run to start.
        on_report: Called with every report of a task. Without it, tasks are not asked for reports.
        on_output: Called with every line that a task or the launcher prints; None prints them.
        listeners: Listening sockets for tasks to inherit. They are closed here once handed over.
        on_end: Called with each task that has ended for good, and its `Ending`.

    Returns:
        The exit code: that of the first task that failed, 128 + N after an interrupt by signal N, else 0.

    Raises:
        ConfigError: If a task cannot be started.
    """
    return LocalRun(spec, on_report, on_output, listeners, on_end).run()


class LocalRun:
    """One run of a `LaunchSpec`; the arguments are those of `run`. It can be run once."""

    def __init__(
        self,
        spec: LaunchSpec,
        on_report: OnReport | None = None,
        on_output: OnOutput | None = None,
        listeners: Mapping[TaskId, socket.socket] | None = None,
        on_end: OnEnd | None = None,
    ) -> None:
        self._spec = spec
        self._on_report = on_report
        self._on_end = on_end
        self._on_output = on_output or Printer(task.task for task in spec.tasks)
        self._listeners = listeners or {}
        self._lifecycle = Lifecycle((task.task for task in spec.tasks), spec.grace, spec.restarts)
        self._specs = {task.task: task for task in spec.tasks}
        self._processes: dict[TaskId, TaskProcess] = {}
        self._replaced: list[TaskProcess] = []
        self._selector = selectors.DefaultSelector()
        self._open_pipes = 0
        self._linger_until: float | None = None

    def __repr__(self) -> str:
        return f"<LocalRun {self._spec.run_id}: {self._lifecycle!r}>"

    def run(self) -> int:
        """Do as the function `run`."""
        if sys.platform != "linux":
            raise ConfigError(f"launch: expected Linux, whose pidfds it waits on, got {sys.platform}")
        with self._selector, _signals() as interrupts:
            self._selector.register(interrupts, selectors.EVENT_READ, partial(self._interrupt, interrupts))
            method = _start_method(self._spec)
            try:
                self._begin(method)
                while not self._is_over():
                    self._turn()
            finally:
                self._sweep(method)
        if self._lifecycle.summary:
            self._say(self._lifecycle.summary)
        return self._lifecycle.exit_code

    def _begin(self, method: StartMethod) -> None:
        if method.ready is None:
            self._start_all(method)
        else:
            self._selector.register(method.ready, selectors.EVENT_READ, partial(self._make_ready, method, method.ready))

    def _make_ready(self, method: StartMethod, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        method.make_ready()
        self._start_all(method)

    def _start_all(self, method: StartMethod) -> None:
        for task in self._specs:
            self._start(task, method)

    def _start(self, task: TaskId, method: StartMethod) -> None:
        listener = self._listeners.get(task)
        process = TaskProcess(self._specs[task], listener, self._on_report is not None, method)
        self._processes[task] = process
        if listener is not None and not self._lifecycle.restarts_left[task]:
            listener.close()  # or else connections to a dead ps would wait in the launcher's copy forever
        self._watch(process, method)

    def _watch(self, process: TaskProcess, method: StartMethod) -> None:
        self._selector.register(process.pidfd, selectors.EVENT_READ, partial(self._end, process, method))
        for descriptor, is_error in ((process.stdout, False), (process.stderr, True)):
            self._watch_lines(descriptor, partial(self._print, process.task, is_error))
        if process.reports is not None:
            self._watch_lines(process.reports, self._report)

    def _watch_lines(self, descriptor: int, handle: Callable[[bytes], None]) -> None:
        read = partial(self._read, descriptor, LineBuffer(), handle)
        self._selector.register(descriptor, selectors.EVENT_READ, read)
        self._open_pipes += 1

    def _is_over(self) -> bool:
        if self._lifecycle.running:
            return self._lifecycle.interrupt is not None and not self._processes  # interrupted before any start
        if self._linger_until is None:
            self._linger_until = time.monotonic() + LINGER
        return not self._open_pipes or time.monotonic() >= self._linger_until

    def _turn(self) -> None:
        now = time.monotonic()
        for task, number in self._lifecycle.take_due(now):
            if number is signal.SIGTERM and not (self._lifecycle.is_stopping or self._lifecycle.has_lost_workers):
                self._say(f"{task} did not end within {self._spec.grace:g} s of the last worker; stopping it")
            self._processes[task].signal(number)
        ends = [end for end in (self._lifecycle.next_due(), self._linger_until) if end is not None]
        timeout = max(0.0, min(ends) - now) if ends else None
        for key, _ in self._selector.select(timeout):
            key.data()

    def _end(self, process: TaskProcess, method: StartMethod) -> None:
        self._selector.unregister(process.pidfd)
        task, ending = process.task, process.ending()
        if self._lifecycle.ended(task, ending, time.monotonic()):
            left = self._lifecycle.restarts_left[task]
            self._say(f"{task} {ending}; it is started again ({self._spec.restarts - left} of {self._spec.restarts})")
            process.signal(signal.SIGKILL)  # the children of the old process must not go on beside the new one
            self._replaced.append(process)
            self._start(task, method)
            return
        if task in self._listeners:
            self._listeners[task].close()
        if self._on_end is not None:
            self._on_end(task, ending)

    def _read(self, descriptor: int, buffer: LineBuffer, handle: Callable[[bytes], None]) -> None:
        data = os.read(descriptor, READ_BYTES)
        for line in buffer.feed(data) if data else buffer.finish():
            handle(line)
        if not data:
            self._selector.unregister(descriptor)
            self._open_pipes -= 1

    def _print(self, task: TaskId, is_error: bool, line: bytes) -> None:
        self._on_output(OutputLine(task, line.decode("utf-8", "replace"), is_error))

    def _report(self, line: bytes) -> None:
        # Any process that the user's script starts may write into this pipe; lines that are not reports are ignored.
        with contextlib.suppress(msgspec.DecodeError):
            report = decode(line)
            if self._on_report is not None:
                self._on_report(report)

    def _interrupt(self, interrupts: socket.socket) -> None:
        for number in interrupts.recv(READ_BYTES):
            if number in (signal.SIGINT, signal.SIGTERM):
                if self._lifecycle.interrupt is None:
                    self._say(f"stopping the run ({signal.Signals(number).name}); once more kills it")
                self._lifecycle.interrupted(number, time.monotonic())

    def _sweep(self, method: StartMethod) -> None:
        for process in self._processes.values():
            process.signal(signal.SIGKILL)
        method.close()
        for process in [*self._processes.values(), *self._replaced]:
            process.close()

    def _say(self, text: str) -> None:
        self._on_output(OutputLine(None, text, is_error=True))


def _start_method(spec: LaunchSpec) -> StartMethod:
    if spec.start_method == "spawn":
        return Spawn()
    python, *_ = spec.tasks[0].command
    return inherited_fork_server() or OwnForkServer(python, shared_environment(spec), spec.preload)


def _plan(options: LaunchOptions, ports: Sequence[int | None], token: str, run_id: str) -> LaunchSpec:
    already_set = [name for name in LEFT_ALONE if environment.is_set(name)]
    return plan(options, ports, token, run_id, usable_cores(), already_set)


def _listener() -> socket.socket:
    return socket.create_server((HOST, 0), backlog=BACKLOG)


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Provide a socket that receives one byte, the signal's number, for each signal that is to end the run."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        old_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # The handler does nothing, but Python writes the byte only for signals that have a handler.
        handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield reader
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_descriptor)
