"""Processes that find torch imported, whose import by each of them would take most of the time of all tests.

They are forks of one process, as the tasks of a launched run are. The launcher itself imports no torch, and is a
program of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from tests.patience import patience

from paramserver.launch.fork_server import READY, ForkServer
from paramserver.launch.spec import PRELOADED
from paramserver.launch.start_methods import Descriptors, Program

Environment = Mapping[str, str] | None
Done = subprocess.CompletedProcess[str]

PATIENCE = patience(60.0)
"""Seconds after which a test gives up; nothing takes this long when it works."""

SCRIPT = "tests.multiprocess.script"


class Options(TypedDict):
    """What ``subprocess`` is called with."""

    env: dict[str, str]
    pass_fds: list[int]


class Warm:
    """Starts processes.

    Args:
        server: Forks them.
    """

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._lifelines: list[int] = []
        self._tasks: list[Task] = []

    @contextlib.contextmanager
    def launcher(self, env: Environment = None) -> Iterator[Options]:
        """How to start a launcher, or whoever acts as one, so that it has a fork server at hand."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            self.start("paramserver.launch.fork_server", *PRELOADED, env=env, stdout=theirs.fileno())
            assert ours.recv(len(READY)) == READY
            surroundings = {**(os.environ if env is None else env), "PARAMSERVER_FORK_SERVER_FD": str(ours.fileno())}
            yield {"env": surroundings, "pass_fds": [ours.fileno()]}

    def launch(self, *arguments: str | Path, env: Environment = None, cwd: Path | None = None) -> Done:
        """``paramserver launch ARGUMENTS...``, to its end."""
        command = [sys.executable, "-m", "paramserver", "launch", *map(str, arguments)]
        with self.launcher(env) as options:
            return subprocess.run(
                command, cwd=cwd, capture_output=True, text=True, timeout=patience(150), check=False, **options
            )

    def run(self, module: str, *arguments: str | Path, env: Environment = None, cwd: Path | None = None) -> Done:
        """``python -m MODULE ARGUMENTS...``, to its end; it has a fork server at hand."""
        with contextlib.chdir(cwd or Path.cwd()), self.launcher(env) as options:
            task = self.task(module, *arguments, env=env, PARAMSERVER_FORK_SERVER_FD=options["pass_fds"][0])
        code, complaints = task.ends()
        return subprocess.CompletedProcess([module, *arguments], code, task.said, complaints)

    def task(self, module: str, *arguments: str | Path, env: Environment = None, **inherited: int) -> Task:
        """Start ``python -m MODULE ARGUMENTS...``; it is killed at the end of the test."""
        task = Task(self, module, *arguments, env=env, **inherited)
        self._tasks.append(task)
        return task

    def start(
        self,
        module: str,
        *arguments: str | Path,
        env: Environment = None,
        stdin: int | None = None,
        stdout: int = 1,
        stderr: int = 2,
        **inherited: int,
    ) -> int:
        """Start a process that holds a lifeline, as will whatever is forked from it; its id."""
        lifeline, writer = os.pipe()
        self._lifelines.append(lifeline)
        program = Program(module, (sys.executable, "-m", module, *map(str, arguments)), env or {})
        descriptors = {"TEST_LIFELINE_FD": writer, **inherited}
        try:
            return self._server.start(
                program, Descriptors(stdin=stdin, stdout=stdout, stderr=stderr, inherited=descriptors)
            )
        finally:
            os.close(writer)

    def code(self, pid: int) -> int:
        """The exit code of a process, whose end is waited for; 128 + N for a death by signal N."""
        handle = os.pidfd_open(pid)
        try:
            assert _is_readable(handle), "it does not end"
            return self._server.ending(pid).code
        finally:
            os.close(handle)

    def close(self) -> None:
        """Kill the tasks, and see that nothing that was ever forked from anything is left."""
        for task in self._tasks:
            task.close()
        for lifeline in self._lifelines:
            assert _is_readable(lifeline), "a process is left"
            os.close(lifeline)


class Task:
    """A process that is told lines, and says some; its complaints are kept.

    Attributes:
        pid: Its id.
        said: What it has said so far.
    """

    def __init__(self, warm: Warm, module: str, *arguments: str | Path, env: Environment, **inherited: int) -> None:
        self.said = ""
        self._warm = warm
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the task
        (stdin, orders), (answers, stdout) = os.pipe(), os.pipe()
        self._orders = os.fdopen(orders, "w")
        self._answers = os.fdopen(answers)
        streams = {"stdin": stdin, "stdout": stdout, "stderr": self._complaints.fileno()}
        self.pid = warm.start(module, *arguments, env=env, **streams, **inherited)
        os.close(stdin)
        os.close(stdout)

    def tell(self, line: str = "") -> None:
        """Tell it a line."""
        print(line, file=self._orders, flush=True)  # to a pipe

    def await_word(self, word: str) -> None:
        """Read what it says until it says the word."""
        for line in self._answers:
            self.said += line
            if word in line:
                return
        raise AssertionError(f"it never said {word!r}, but {self.said!r}, and {self.ends()}")

    def kill(self) -> None:
        """SIGKILL, and the proof that it died of it."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._warm.code(self.pid) == 128 + signal.SIGKILL

    def ends(self) -> tuple[int, str]:
        """Its exit code and its complaints, once it has ended."""
        self._orders.close()
        self.said += self._answers.read()
        code = self._warm.code(self.pid)
        self._complaints.seek(0)
        return code, self._complaints.read()

    def close(self) -> None:
        """Kill it if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for file in (self._orders, self._answers, self._complaints):
            file.close()


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))
