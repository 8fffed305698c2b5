"""A run as processes on this machine, watched by one loop that waits for the next event."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from paramserver.cluster import environment, run_file
from paramserver.cluster.exit_codes import CONSEQUENCE
from paramserver.cluster.report import decode
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.backends import OnEnd, OnOutput, OnReport
from paramserver.launch.cores import usable_cores
from paramserver.launch.fork_server import OwnForkServer, inherited_fork_server
from paramserver.launch.lifecycle import Lifecycle
from paramserver.launch.output import LineBuffer, OutputLine, Printer
from paramserver.launch.process import TaskProcess
from paramserver.launch.signals import ENDING, PASSED_ON, caught_signals
from paramserver.launch.spec import HOST, LEFT_ALONE, LaunchOptions, LaunchSpec, describe, plan, shared_environment
from paramserver.launch.start_methods import Spawn, StartMethod
from paramserver.layout.lanes import check_platform

LINGER = 1.0
"""Seconds that helper processes, such as multiprocessing's resource tracker, get after all tasks have ended."""

BACKLOG = 128
"""Number of connections that may wait for a ps that is still starting."""

READ_BYTES = 65536

SLOW_START = 10.0
"""Seconds after which a start is said to be slow."""


def launch(
    options: LaunchOptions,
    on_report: OnReport | None = None,
    on_output: OnOutput | None = None,
    on_end: OnEnd | None = None,
) -> int:
    """Run what ``options`` ask for on this machine; see `Backend.launch`.

    Raises:
        ConfigError: If a task cannot be started, or this system is not Linux.
    """
    check_platform("launch")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(listener()) for _ in range(options.ps)]
        ports = [sock.getsockname()[1] for sock in sockets]
        token, run_id = secrets.token_hex(16), secrets.token_hex(4)
        addresses = [f"{HOST}:{port}" for port in ports]
        path = run_file.write(
            run_file.Run(run_id=run_id, script=options.script, launcher=os.getpid(), ps=addresses, token=token)
        )
        stack.callback(run_file.remove, path)
        spec = _plan(options, ports, token, run_id, path)
        listeners = {TaskId(Role.PS, index): sock for index, sock in enumerate(sockets)}
        return run(spec, on_report, on_output, listeners, on_end)


def dry_run(options: LaunchOptions) -> str:
    """Return a description of what `launch` would start; see `Backend.dry_run`. Binds and starts nothing."""
    return describe(_plan(options, [None] * options.ps, "***", "<run id>"))


def run(
    spec: LaunchSpec,
    on_report: OnReport | None = None,
    on_output: OnOutput | None = None,
    listeners: Mapping[TaskId, socket.socket] | None = None,
    on_end: OnEnd | None = None,
) -> int:
    """Start the tasks of ``spec``, wait for the end of the run, and leave no process behind.

    Runs in the main thread only, because it takes over these signals while it runs: SIGINT and SIGTERM end the run, the
    second one at once. SIGHUP, SIGUSR1 and SIGUSR2 are passed on to the tasks that handle them; a SIGHUP that no task
    handles ends the run.

    Args:
        spec: The run to start.
        on_report: Called with every report of a task. Without it, tasks are not asked for reports.
        on_output: Called with every line that a task or the launcher prints; None prints them.
        listeners: Listening sockets for tasks to inherit. They are closed here once handed over.
        on_end: Called with each task that has ended for good, and its `Ending`.

    Returns:
        The exit code: that of the first task that failed of its own, 128 + N after an interrupt by signal N, else 0.

    Raises:
        ConfigError: If a task cannot be started.
    """
    return LocalRun(spec, on_report, on_output, listeners, on_end).run()


class LocalRun:
    """One run of a `LaunchSpec`; the arguments are those of `run`. It can be run once.

    ``lifecycle`` replaces the rules of a launched run by others.
    """

    def __init__(
        self,
        spec: LaunchSpec,
        on_report: OnReport | None = None,
        on_output: OnOutput | None = None,
        listeners: Mapping[TaskId, socket.socket] | None = None,
        on_end: OnEnd | None = None,
        lifecycle: Lifecycle | None = None,
    ) -> None:
        self._spec = spec
        self._on_report = on_report
        self._on_end = on_end
        self._on_output = on_output or Printer(task.task for task in spec.tasks)
        self._listeners = listeners or {}
        self._lifecycle = lifecycle or Lifecycle((task.task for task in spec.tasks), spec.limits)
        self._specs = {task.task: task for task in spec.tasks}
        self._processes: dict[TaskId, TaskProcess] = {}
        self._replaced: list[TaskProcess] = []
        self._selector = selectors.DefaultSelector()
        self._open_pipes = 0
        self._is_killing = self._has_named = False
        self._linger_until: float | None = None
        self._say_slow_at = math.inf

    def __repr__(self) -> str:
        return f"<LocalRun {self._spec.run_id}: {self._lifecycle!r}>"

    def run(self) -> int:
        """Do as the function `run`."""
        if sys.platform != "linux":
            raise ConfigError(f"launch: expected Linux, whose pidfds it waits on, got {sys.platform}")
        with self._selector, caught_signals() as interrupts:
            self._selector.register(interrupts, selectors.EVENT_READ, partial(self._interrupt, interrupts))
            method = _start_method(self._spec)
            try:
                self._begin(method)
                while not self._is_over():
                    self._turn(method)
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
            self._say_slow_at = time.monotonic() + SLOW_START

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
        if listener is not None and not self._spec.limits.restarts:
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

    def _turn(self, method: StartMethod) -> None:
        now = time.monotonic()
        for task in self._lifecycle.take_starts(now):
            self._start_again(task, method)
        for task, number in self._lifecycle.take_due(now):
            self._tell(task, number)
        if now >= self._say_slow_at:
            self._say_slow_at = math.inf
            if not self._processes:
                self._say(f"tasks are not started yet: the import of torch has taken {SLOW_START:g} s so far")
        ends = [end for end in (self._lifecycle.next_due(), self._linger_until, self._say_slow_at) if end is not None]
        timeout = max(0.0, min(ends) - now) if min(ends) < math.inf else None
        for key, _ in self._selector.select(timeout):
            key.data()

    def _end(self, process: TaskProcess, method: StartMethod) -> None:
        self._selector.unregister(process.pidfd)
        task, ending = process.task, process.ending()
        pause = self._lifecycle.ended(task, ending, time.monotonic())
        while self._lifecycle.remarks:
            self._say(self._lifecycle.remarks.pop(0))
        if pause is not None:
            self._say(f"{task} {ending}; it is started again in {pause:g} s ({self._lifecycle.count(task)})")
            return
        if task in self._listeners:
            self._listeners[task].close()
        if self._lifecycle.has_finished and self._spec.run_file is not None:
            run_file.remove(self._spec.run_file)
        if ending.code != CONSEQUENCE:
            self._name_culprit()
        if self._on_end is not None:
            self._on_end(task, ending)

    def _start_again(self, task: TaskId, method: StartMethod) -> None:
        old = self._processes[task]
        old.kill()  # its children must not go on beside the new process
        self._replaced.append(old)
        self._start(task, method)

    def _name_culprit(self) -> None:
        """Say once, while others still run, who has failed of its own, or after a while the first who has failed."""
        lifecycle = self._lifecycle
        if lifecycle.culprit is None or self._has_named or not lifecycle.running or lifecycle.interrupt is not None:
            return
        task, ending = lifecycle.culprit
        self._has_named = True
        self._say(f"{task} {ending}; {'stopping the run' if lifecycle.is_stopping else 'the others go on'}")

    def _tell(self, task: TaskId, number: signal.Signals) -> None:
        limits = self._spec.limits
        if number is signal.SIGKILL:
            if not self._is_killing:
                self._say(f"{task} did not end within {limits.shutdown_timeout:g} s of SIGTERM; killing it")
            self._processes[task].kill()
            return
        if self._lifecycle.is_stopping:
            self._name_culprit()
        elif reason := self._lifecycle.reason_to_leave(task):
            self._say(reason)
        self._processes[task].send(number)

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
            if number in PASSED_ON and (self._pass_on(signal.Signals(number)) or number != signal.SIGHUP):
                continue
            if number in ENDING:
                self._end_run(signal.Signals(number))

    def _pass_on(self, number: signal.Signals) -> bool:
        """Send a signal to the tasks that handle it, and return whether there are any."""
        handling = [process for process in self._processes.values() if process.handles(number)]
        for process in handling:
            process.send(number)
        if not handling and number is not signal.SIGHUP:
            self._say(f"{number.name}: no task has a handler for it; the run goes on")
        return bool(handling)

    def _end_run(self, number: signal.Signals) -> None:
        self._is_killing = self._lifecycle.interrupt is not None
        if not self._is_killing:
            self._say(f"stopping the run ({number.name}); once more kills it")
        self._lifecycle.interrupted(number, time.monotonic())

    def _sweep(self, method: StartMethod) -> None:
        for process in self._processes.values():
            process.kill()
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


def _plan(
    options: LaunchOptions, ports: Sequence[int | None], token: str, run_id: str, path: Path | None = None
) -> LaunchSpec:
    already_set = [name for name in LEFT_ALONE if environment.is_set(name)]
    return plan(options, ports, token, run_id, usable_cores(), already_set, run_file=path)


def listener() -> socket.socket:
    """Return a listening socket with a free port, for a ps."""
    return socket.create_server((HOST, 0), backlog=BACKLOG)
