"""The output of tasks: bytes are cut into whole lines, and lines are printed to this terminal with a prefix."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TextIO

import msgspec
from rich.console import Console
from rich.style import Style

from paramserver.cluster.logs import Record, timestamp
from paramserver.cluster.task import TaskId
from paramserver.errors import ConfigError

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")


class OutputLine(NamedTuple):
    """One line that a task has printed, or the launcher itself if ``task`` is None."""

    task: TaskId | None
    text: str
    is_error: bool
    """Whether it was printed to stderr."""


class LineBuffer:
    r"""Cuts a stream of bytes into lines, without their line ends.

    A lone ``\r`` ends a line too, or else a progress bar that overwrites itself would never be shown.
    """

    LIMIT_BYTES = 65536
    """Length at which a line is cut, so that a task that prints no line ends cannot fill the launcher's memory."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that ``data`` completes."""
        *complete, rest = (self._rest + data).split(b"\n")
        lines = [piece for line in complete for piece in _pieces(line) or [b""]]
        overwritten, _, last = rest.rpartition(b"\r")
        if last:  # else a final \r may be the first half of \r\n
            lines += _pieces(overwritten)
            rest = last
        if len(rest) > self.LIMIT_BYTES:
            lines.append(rest)
            rest = b""
        self._rest = rest
        return lines

    def finish(self) -> list[bytes]:
        """Return the rest after the stream has ended."""
        rest, self._rest = self._rest, b""
        return _pieces(rest)


class Printer:
    """Prints lines as ``chief:0 | text``, coloured on a terminal."""

    def __init__(self, tasks: Iterable[TaskId], stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        tasks = tuple(tasks)
        self._prefixes = {
            False: _prefixes(tasks, self._stdout),
            True: _prefixes(tasks, self._stderr),
        }

    def __call__(self, line: OutputLine) -> None:
        """Print one line at once."""
        stream = self._stderr if line.is_error else self._stdout
        prefix = self._prefixes[line.is_error][line.task] if line.task else ""
        encoding = stream.encoding or "utf-8"
        # A terminal that cannot show a task's character must not end the run.
        text = line.text.encode(encoding, "replace").decode(encoding)
        stream.write(f"{prefix}{text}\n")
        stream.flush()


class JsonPrinter:
    """Prints each line as an object of JSON; a task's line that is one already is printed as it is."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def __call__(self, line: OutputLine) -> None:
        """Print one line at once."""
        self._stream.write(f"{line.text if _is_record(line.text) else self._record(line)}\n")
        self._stream.flush()

    def _record(self, line: OutputLine) -> str:
        record = Record(
            time=timestamp(datetime.now().astimezone()),
            level="" if line.task else "info",
            task=str(line.task or "launcher"),
            message=line.text,
            stream=("stderr" if line.is_error else "stdout") if line.task else "",
        )
        return msgspec.json.encode(record).decode()


class LogFiles:
    """Writes the lines of each task into a file of its own: ``ps-0.log``, ``chief-0.log``, ``launcher.log``.

    Args:
        folder: The folder; made if it does not exist. Files of an earlier run are continued.

    Raises:
        ConfigError: If the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[TaskId | None, TextIO] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file(None)
        except OSError as error:
            raise ConfigError(f"--log-dir: {folder} cannot be written: {error.strerror}") from error

    def __call__(self, line: OutputLine) -> None:
        """Write one line at once."""
        file = self._file(line.task)
        file.write(f"{line.text}\n")
        file.flush()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _file(self, task: TaskId | None) -> TextIO:
        if task not in self._files:
            name = f"{task.role}-{task.index}" if task else "launcher"
            self._files[task] = (self._folder / f"{name}.log").open("a", encoding="utf-8", errors="replace")
        return self._files[task]


def _is_record(text: str) -> bool:
    with contextlib.suppress(msgspec.DecodeError):  # an ordinary line
        msgspec.json.decode(text, type=Record)
        return True
    return False


def colours(tasks: Iterable[TaskId]) -> dict[TaskId, str]:
    """Return the colour of each task's prefix."""
    return dict(zip(tasks, itertools.cycle(COLOURS), strict=False))


def _prefixes(tasks: tuple[TaskId, ...], stream: TextIO) -> dict[TaskId, str]:
    plain = {task: f"{task} | " for task in tasks}
    console = Console(file=stream)
    if console.color_system is None or console.no_color:  # not a terminal, or the user wants no colours
        return plain
    return {task: Style.parse(colour).render(plain[task]) for task, colour in colours(tasks).items()}


def _pieces(line: bytes) -> list[bytes]:
    return [piece for piece in line.split(b"\r") if piece]
