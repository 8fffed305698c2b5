"""The ways in which a task becomes a process: its own Python, or a fork of one that has imported torch."""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paramserver.cluster import environment
from paramserver.launch.guard import Guard
from paramserver.launch.lifecycle import Ending
from paramserver.launch.spec import INHERITED


class Program(NamedTuple):
    """The program of a process.

    Attributes:
        name: The name of the process in lists of processes, if its start method can set it.
        command: Program and arguments; for forks ``PYTHON -m MODULE ARGUMENTS...``.
        env: Additions to the launcher's own environment.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """The open files for a process. The launcher still owns them, and closes them.

    Attributes:
        stdin: Its standard input; None for an empty one.
        stdout: Its standard output.
        stderr: Its standard error.
        inherited: Descriptors by the environment variable that holds their number.
    """

    stdin: int | None = None
    stdout: int
    stderr: int
    inherited: Mapping[str, int]


class StartMethod(ABC):
    """Starts processes, each the leader of a session and process group of its own, which the guard knows.

    A process that has ended stays a zombie until `close`: before that, its id, which is also that of its group, cannot
    be given to another process.

    Attributes:
        ready: A descriptor that is readable once `make_ready` does not block; None if `start` can be called at once.
    """

    ready: int | None = None

    def __init__(self) -> None:
        self._guard = Guard()

    def make_ready(self) -> None:  # noqa: B027  # not abstract: nothing has to be done if `ready` is None
        """Wait until `start` can be called.

        Raises:
            ConfigError: If it never can.
        """

    @abstractmethod
    def start(self, program: Program, descriptors: Descriptors) -> int:
        """Start a process, and return its id. Blocks until its program has begun.

        Raises:
            OSError: If the system refuses.
        """

    @abstractmethod
    def ending(self, pid: int) -> Ending:
        """Return how a process ended. Blocks until it has."""

    def close(self) -> None:
        """Reap all started processes, which must have ended or been killed."""
        self._guard.close()  # first, or it could kill groups whose ids are in use again
        self._reap()

    @abstractmethod
    def _reap(self) -> None: ...


class Spawn(StartMethod):
    """Starts each process as a program of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, program: Program, descriptors: Descriptors) -> int:
        # preexec_fn, because a launcher that is killed before Popen returns would leave a group behind that the guard
        # does not know yet. The function takes no lock, so that other threads of the launcher cannot block it.
        process = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL if descriptors.stdin is None else descriptors.stdin,
            stdout=descriptors.stdout,
            stderr=descriptors.stderr,
            env=task_environment({**program.env, **as_text(descriptors.inherited)}),
            pass_fds=tuple(descriptors.inherited.values()),
            start_new_session=True,
            preexec_fn=self._guard.enter,
        )
        self._processes[process.pid] = process
        return process.pid

    def ending(self, pid: int) -> Ending:
        return ending(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT))

    def _reap(self) -> None:
        for process in self._processes.values():
            process.wait()


def task_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a task: that of this process, with these variables.

    A launcher may itself be a task, so the variables for its own inherited descriptors are left out.
    """
    ours = environment.for_child({})
    return {**{name: value for name, value in ours.items() if name not in INHERITED}, **variables}


def as_text(inherited: Mapping[str, int]) -> dict[str, str]:
    """Return the environment variables that hold the numbers of a task's inherited descriptors."""
    return {name: str(number) for name, number in inherited.items()}


def ending(info: os.waitid_result | None) -> Ending:
    """Convert the result of ``os.waitid``, which is never None after a blocking call."""
    assert info is not None  # noqa: S101  # None is for WNOHANG
    if info.si_code == os.CLD_EXITED:
        return Ending(info.si_status)
    return Ending(128 + info.si_status, info.si_status)
