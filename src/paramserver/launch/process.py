"""One task as a process of this machine: its start, its pipes, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess

from paramserver.cluster import environment
from paramserver.errors import ConfigError
from paramserver.launch.guard import Guard
from paramserver.launch.rules import Ending
from paramserver.launch.spec import TaskSpec


class TaskProcess:
    """A started task, the leader of a session and process group of its own.

    The process is not reaped before `close`, also when it has ended: until then its id, which is its group's
    id as well, cannot be given to a stranger, and a signal to the group reaches nobody else.

    Attributes:
        task: Who it is.
        pidfd: A descriptor that is readable once the process has ended.
        stdout: The reading end of what it prints.
        stderr: The reading end of what it complains about.
        reports: The reading end of its reports; None where nobody wants them.
    """

    def __init__(self, spec: TaskSpec, listener: socket.socket | None, reports: bool, guard: Guard) -> None:
        self.task = spec.task
        self.reports: int | None = None
        report_writer: int | None = None
        if reports:
            self.reports, report_writer = os.pipe()
        try:
            self._process = _start(spec, listener, report_writer, guard)
        except OSError as exc:
            if self.reports is not None:
                os.close(self.reports)
            raise ConfigError(f"start of {spec.task} failed: {spec.command[0]}: {exc.strerror}") from exc
        finally:
            if report_writer is not None:
                os.close(report_writer)
        assert self._process.stdout is not None  # noqa: S101  # both are pipes; this tells the type checker
        assert self._process.stderr is not None  # noqa: S101
        self.stdout = self._process.stdout.fileno()
        self.stderr = self._process.stderr.fileno()
        self.pidfd = os.pidfd_open(self._process.pid)

    def __repr__(self) -> str:
        return f"<TaskProcess {self.task} pid {self._process.pid}>"

    def ending(self) -> Ending:
        """How it ended. Blocks until it has."""
        # WNOWAIT leaves it to be reaped, see the class.
        info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        assert info is not None  # noqa: S101  # None is for WNOHANG
        if info.si_code == os.CLD_EXITED:
            return Ending(info.si_status)
        return Ending(128 + info.si_status, info.si_status)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to all that it has started in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Reap the process, which must have ended or been killed, and close what is open. Call it once."""
        self._process.wait()
        os.close(self.pidfd)
        if self.reports is not None:
            os.close(self.reports)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def _start(
    spec: TaskSpec, listener: socket.socket | None, report_writer: int | None, guard: Guard
) -> subprocess.Popen[bytes]:
    inherited: dict[str, int] = {}
    if listener is not None:
        inherited["PARAMSERVER_LISTEN_FD"] = listener.fileno()
    if report_writer is not None:
        inherited["PARAMSERVER_REPORT_FD"] = report_writer
    env = environment.for_child({**spec.env, **{name: str(number) for name, number in inherited.items()}})
    for name in {"PARAMSERVER_LISTEN_FD", "PARAMSERVER_REPORT_FD"} - inherited.keys():
        env.pop(name, None)  # a launcher may itself be a task; its descriptors are not its children's
    # preexec_fn, because a group that the guard hears of only when Popen returns would be left behind by a
    # launcher that is killed in between. What is run there takes no lock, so threads of ours cannot block it.
    return subprocess.Popen(
        spec.command,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        pass_fds=tuple(inherited.values()),
        start_new_session=True,
        preexec_fn=guard.enter,
    )
