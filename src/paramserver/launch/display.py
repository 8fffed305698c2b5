"""A launched run on a terminal: the lines of its tasks, and below them the progress of the run."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Self, TypeAlias

from rich.console import Console
from rich.live import Live
from rich.text import Text

from paramserver.cluster import environment
from paramserver.cluster.task import TaskId
from paramserver.launch import backends
from paramserver.launch.output import JsonPrinter, LogFiles, OutputLine, Printer, colours
from paramserver.launch.progress import ProgressLines, RunProgress
from paramserver.launch.spec import LaunchOptions, task_ids

Start: TypeAlias = Callable[[backends.OnReport, backends.OnOutput, backends.OnEnd], int]

INTERVAL = 0.25
"""Seconds between two drawings, each of which takes milliseconds. Lines wait for the next drawing: drawing after each
line would slow down a task that prints many."""

LINES_AT_ONCE = 1000
"""Limit for waiting lines; more are drawn at once, so that a task cannot fill the launcher's memory."""


def launch_displayed(options: LaunchOptions) -> int:
    """Do `launch` with a display if there is a terminal; otherwise with the lines of the tasks and of the progress.

    Raises:
        ConfigError: If a task cannot be started, or the folder for logs cannot be written.
    """
    start = partial(backends.load(options.on).launch, options)
    return displayed(task_ids(options), start, log_format=options.log_format, log_dir=options.log_dir)


def displayed(
    tasks: Sequence[TaskId], start: Start, *, log_format: str | None = None, log_dir: Path | None = None
) -> int:
    """Do as `launch_displayed` for a run of any kind.

    Args:
        tasks: The tasks of the run.
        start: Runs it, and returns its exit code.
        log_format: As in `LaunchOptions`.
        log_dir: As in `LaunchOptions`.

    Raises:
        ConfigError: As ``start`` does, or if the folder for logs cannot be written.
    """
    progress = RunProgress.of(tasks)
    with contextlib.ExitStack() as stack:
        as_json = (log_format or environment.read().log_format) == "json"
        console = None if as_json else find_terminal()
        shown = stack.enter_context(Display(progress, console, tasks)).show if console else _printer(tasks, as_json)
        outputs = [shown]
        if log_dir is not None:
            files = LogFiles(log_dir)
            stack.callback(files.close)
            outputs.append(files)

        def show(line: OutputLine) -> None:
            for output in outputs:
                output(line)

        def say(text: str) -> None:
            show(OutputLine(None, text, is_error=True))

        lines = ProgressLines(progress, say if console is None else lambda _: None)
        code = start(lines.take, show, progress.end)
        if not code and progress.has_updated is False:
            say("the run has ended without a single update of a model")
        return code


def _printer(tasks: Iterable[TaskId], as_json: bool) -> backends.OnOutput:
    return JsonPrinter() if as_json else Printer(tasks)


def find_terminal() -> Console | None:
    """Return the terminal of stdout and stderr; None if one of them is not a terminal, or it cannot be drawn on."""
    console = Console()
    if not (sys.stdout.isatty() and sys.stderr.isatty()):  # with FORCE_COLOR, the console takes a file for a terminal
        return None
    return console if console.is_interactive and console.encoding.startswith("utf") else None


class Display:
    """A display that draws on a thread of its own while it is entered; afterwards only the printed lines remain.

    Args:
        progress: The content of the display, at the bottom of the terminal.
        console: The terminal.
        tasks: The tasks that print lines.
    """

    def __init__(self, progress: RunProgress, console: Console, tasks: Iterable[TaskId] = ()) -> None:
        self._console = console
        self._colours = colours(tasks)
        self._live = Live(progress, console=console, auto_refresh=False, transient=True)
        self._lines: list[OutputLine] = []
        self._drawing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="display")

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        try:
            self._draw()
        finally:
            self._live.stop()

    def show(self, line: OutputLine) -> None:
        """Print one line above the display, soon. For one thread."""
        self._lines.append(line)
        if len(self._lines) >= LINES_AT_ONCE:
            self._draw()

    def _keep_drawing(self) -> None:
        while not self._over.wait(INTERVAL):
            self._draw()

    def _draw(self) -> None:
        with self._drawing:  # keeps the lines in their order
            count = len(self._lines)
            lines = self._lines[:count]
            del self._lines[:count]
            if lines:
                self._console.print(Text("\n").join(map(self._text, lines)), soft_wrap=True)
            else:
                self._live.refresh()

    def _text(self, line: OutputLine) -> Text:
        # Control codes that would move the cursor are left out, colours stay.
        text = Text.from_ansi(line.text)
        return Text.assemble((f"{line.task} | ", self._colours[line.task]), text) if line.task else text
