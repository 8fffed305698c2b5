"""How a task becomes a process: its own Python, or a fork of one that has imported torch (``fork_server``)."""

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
    """What a process runs.

    Attributes:
        name: What it is called in lists of processes, where its start method can say so.
        command: Program and arguments; for forks ``PYTHON -m MODULE ARGUMENTS...``.
        env: What is added to the launcher's own environment.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """The open files that a process gets. They stay the launcher's, to be closed by it.

    Attributes:
        stdin: What it reads; None for nothing.
        stdout: What it prints to.
        stderr: What it complains to.
        inherited: What it finds by a variable of its environment: name -> descriptor.
    """

    stdin: int | None = None
    stdout: int
    stderr: int
    inherited: Mapping[str, int]


class StartMethod(ABC):
    """Starts processes, each the leader of a session and process group of its own that the guard knows of.

    A process that has ended stays a zombie until `close`: until then its id, which is its group's as well, cannot be
    given to a stranger.

    Attributes:
        ready: A descriptor that is readable once `make_ready` does not block; None if `start` can be called at once.
    """

    ready: int | None = None

    def __init__(self) -> None:
        self._guard = Guard()

    def make_ready(self) -> None:  # noqa: B027  # not abstract: there is nothing to do where `ready` is None
        """Wait until `start` can be called.

        Raises:
            ConfigError: If it never will.
        """

    @abstractmethod
    def start(self, program: Program, descriptors: Descriptors) -> int:
        """Start a process, and return its id. Blocks until its program has begun.

        Raises:
            OSError: If the system refuses.
        """

    @abstractmethod
    def ending(self, pid: int) -> Ending:
        """How a process ended. Blocks until it has."""

    def close(self) -> None:
        """Reap what was started, all of which must have ended or been killed."""
        self._guard.close()  # first: it must not kill groups whose ids are free again
        self._reap()

    @abstractmethod
    def _reap(self) -> None: ...


class Spawn(StartMethod):
    """Starts each process as a program of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, program: Program, descriptors: Descriptors) -> int:
        # preexec_fn, because a group that the guard hears of only when Popen returns would be left behind by a
        # launcher that is killed in between. What is run there takes no lock, so threads of ours cannot block it.
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
    """The environment of a task: ours, with these variables.

    A launcher may itself be a task, so what it has inherited is left out: its descriptors are not its children's.
    """
    ours = environment.for_child({})
    return {**{name: value for name, value in ours.items() if name not in INHERITED}, **variables}


def as_text(inherited: Mapping[str, int]) -> dict[str, str]:
    """The variables that tell a task where its descriptors are."""
    return {name: str(number) for name, number in inherited.items()}


def ending(info: os.waitid_result | None) -> Ending:
    """What ``os.waitid`` has found, which is never None where it waits."""
    assert info is not None  # noqa: S101  # None is for WNOHANG
    if info.si_code == os.CLD_EXITED:
        return Ending(info.si_status)
    return Ending(128 + info.si_status, info.si_status)
