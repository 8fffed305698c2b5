"""One task as a process on this machine: its start, its pipes, its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from pathlib import Path

from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Ending
from paramserver.launch.spec import TaskSpec
from paramserver.launch.start_methods import Descriptors, Program, StartMethod


class TaskProcess:
    """A started task, the leader of a session and process group of its own.

    The process is not reaped before its start method is closed, even after it has ended, so a signal to its group never
    reaches another group with the same id.

    Attributes:
        task: The task.
        pidfd: A descriptor that is readable once the process has ended.
        stdout: The reading end of its standard output.
        stderr: The reading end of its standard error.
        reports: The reading end of its reports; None if it was not asked for reports.

    Raises:
        ConfigError: If the process cannot be started.
    """

    def __init__(self, spec: TaskSpec, listener: socket.socket | None, reports: bool, method: StartMethod) -> None:
        self.task = spec.task
        self._method = method
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as writers:
            self.stdout, stdout = _pipe(on_failure, writers)
            self.stderr, stderr = _pipe(on_failure, writers)
            self.reports: int | None = None
            inherited = {} if listener is None else {"PARAMSERVER_LISTEN_FD": listener.fileno()}
            if reports:
                self.reports, inherited["PARAMSERVER_REPORT_FD"] = _pipe(on_failure, writers)
            program = Program(str(spec.task), spec.command, spec.env)
            try:
                self._pid = method.start(program, Descriptors(stdout=stdout, stderr=stderr, inherited=inherited))
            except OSError as exc:
                raise ConfigError(f"start of {spec.task} failed: {spec.command[0]}: {exc.strerror}") from exc
            self.pidfd = os.pidfd_open(self._pid)
            on_failure.pop_all()

    def __repr__(self) -> str:
        return f"<TaskProcess {self.task} pid {self._pid}>"

    def ending(self) -> Ending:
        """Return how the process ended. Blocks until it has."""
        return self._method.ending(self._pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone: what it has started is its own to end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """Kill the process and all processes in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def handles(self, number: signal.Signals) -> bool:
        """Return whether the process has a handler of its own for a signal."""
        with contextlib.suppress(OSError):  # it has ended
            for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
        return False

    def close(self) -> None:
        """Wait for the process, which must have ended or been killed, and close all descriptors. Call this once."""
        poll = select.poll()  # not select, which refuses descriptors above 1023
        poll.register(self.pidfd, select.POLLIN)
        poll.poll()
        for descriptor in (self.pidfd, self.stdout, self.stderr, self.reports):
            if descriptor is not None:
                os.close(descriptor)


def _pipe(readers: contextlib.ExitStack, writers: contextlib.ExitStack) -> tuple[int, int]:
    """Return both ends of a pipe, each of which is closed by a stack."""
    reader, writer = os.pipe()
    readers.callback(os.close, reader)
    writers.callback(os.close, writer)
    return reader, writer
