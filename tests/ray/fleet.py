"""A cluster of Ray for tests, and the commands that run on it. Its processes are looked at from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from tests.patience import patience

PATIENCE = patience(15)
NODES = 2
"""Beside the head, which has no CPUs for tasks."""
PARAMSERVER = (sys.executable, "-m", "paramserver")
_FILE = re.compile(rb"PARAMSERVER_TF_CONFIG_FILE=([^\0]+)")
_OURS = re.compile(rb"TaskHost|FunctionHost")


class Command:
    """A program that was started beside the cluster, with its output.

    Attributes:
        process: The program.
        said: What it has said so far, on both streams.
    """

    def __init__(self, *command: str, folder: Path, env: dict[str, str]) -> None:
        self.said = ""
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    def await_word(self, pattern: str) -> None:
        """Read what it says until a line of it has the pattern."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"it never said {pattern!r}, but {self.said!r}")

    def ends(self) -> int:
        """Its exit code, once it has ended."""
        self.said += self.process.communicate(timeout=PATIENCE)[0]
        return self.process.returncode

    def close(self) -> None:
        """Kill it if it still runs. Idempotent."""
        self.process.kill()
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.process.communicate()


class Fleet:
    """A head and two nodes. A context manager.

    Attributes:
        address: The address of the cluster.
    """

    def __init__(self) -> None:
        self.address = ""
        self._commands: list[Command] = []
        self._nodes: set[int] = set()
        self._program = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nodes.py"))],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        self.address = str(self._read())
        self.complete()
        return self

    def __exit__(self, *_: object) -> None:
        self._program.communicate(timeout=PATIENCE)  # its input ends

    def complete(self) -> None:
        """Add nodes in place of those that were removed."""
        while len(self._nodes) < NODES:
            pid = self._ask("add")
            assert isinstance(pid, int)
            self._nodes.add(pid)

    def launch(self, folder: Path, *arguments: str, **env: str) -> Command:
        """Start ``paramserver launch --on ray``."""
        return self.start(folder, *PARAMSERVER, "launch", "--on", "ray", "--address", self.address, *arguments, **env)

    def start(self, folder: Path, *command: str, **env: str) -> Command:
        """Start a program that belongs to the test."""
        self._commands.append(Command(*command, folder=folder, env=env))
        return self._commands[-1]

    def clean_up(self) -> None:
        """Kill the programs of a test, and wait until the cluster is idle and whole."""
        while self._commands:
            self._commands.pop().close()
        self.await_idle()
        self.complete()

    def remove_node_of(self, task: str) -> None:
        """Kill the processes of the node that holds a task."""
        pid = self.process_of(task)
        while pid not in self._nodes:
            pid = _parent(pid)
        self._nodes.discard(pid)
        self._ask(f"remove {pid}")

    def process_of(self, task: str) -> int:
        """The process of a task that is no function."""
        role, _, index = task.partition(":")
        for pid, environ in _environments():
            found = _FILE.search(environ)
            if found and not _OURS.search(_command_line(pid)):
                named = json.loads(Path(os.fsdecode(found[1])).read_text())["task"]
                if named == {"type": role, "index": int(index)}:
                    return pid
        raise AssertionError(f"there is no {task}")

    def await_idle(self) -> None:
        """Wait until no actor and no task is left."""
        await_true("tasks or actors are left", lambda: not list(_remaining()))

    def _ask(self, command: str) -> object:
        assert self._program.stdin is not None
        self._program.stdin.write(f"{command}\n")
        self._program.stdin.flush()
        return self._read()

    def _read(self) -> object:
        assert self._program.stdout is not None
        for line in self._program.stdout:
            if line.startswith(("{", '"', "null")) or line.strip().isdecimal():  # Ray prints lines of its own
                return json.loads(line)
        raise AssertionError("the cluster has ended")


def await_true(what: str, is_true: Callable[[], bool]) -> None:
    """Look again and again until something is true."""
    give_up = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


def interrupt(command: Command, number: signal.Signals = signal.SIGINT) -> None:
    """Send a signal to a program and all that it has started, as a terminal does."""
    os.killpg(command.process.pid, number)


def _environments() -> Iterator[tuple[int, bytes]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                yield int(entry.name), (entry / "environ").read_bytes()
            except OSError:  # it has ended
                continue


def _remaining() -> Iterator[int]:
    for pid, environ in _environments():
        if b"PARAMSERVER_RAY_RUN=" in environ or _OURS.search(_command_line(pid)):
            yield pid


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
