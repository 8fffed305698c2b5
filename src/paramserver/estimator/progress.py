"""The progress of an evaluation or a prediction: a temporary line on the terminal, or a report to the launcher."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from paramserver.cluster import TFConfigClusterResolver, environment
from paramserver.cluster.report import Reporter

T = TypeVar("T")

INTERVAL = 0.2
"""Seconds between two drawings."""

_ERASE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class ProgressLine:
    """Counts batches and shows their number and rate. Not thread-safe; starts no thread.

    Args:
        what: The activity, such as ``evaluating ckpt-100``.
        total: Number of batches; None if it is unknown.
        console: The console to draw on; None draws nothing.
        clock: Returns the present time in seconds.
        reporter: Reports to the launcher; None reports nothing.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        console: Console | None,
        clock: Callable[[], float] = time.monotonic,
        reporter: Reporter | None = None,
    ) -> None:
        self._what = what
        self._total = total
        self._console = console
        self._reporter = reporter
        self._clock = clock
        self._began = self._drawn_at = clock()
        self._is_shown = False
        self.done = 0
        """Batches that were begun before the present one."""

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same batches, and count them as they are taken."""
        for batch in batches:
            self._draw()
            yield batch
            self.done += 1

    def clear(self) -> None:
        """Erase the line until the next batch is taken. Idempotent."""
        if self._is_shown and self._console is not None:
            self._console.control(_ERASE)
            self._is_shown = False

    def __str__(self) -> str:
        elapsed = self._clock() - self._began
        rate = f", {self.done / elapsed:.1f} batches/s" if elapsed else ""
        of = f" of {self._total}" if self._total else ""
        return f"{self._what}: {self.done}{of} batches{rate}"

    def _draw(self) -> None:
        now = self._clock()
        if now - self._drawn_at < INTERVAL:
            return
        self._drawn_at = now
        if self._reporter is not None:
            self._reporter.tell(state=str(self))
        if self._console is not None:
            self.clear()
            text = str(self)[: self._console.width - 1]  # a full line would make the terminal begin another line
            self._console.print(Text(text, style="dim"), end="")
            self._is_shown = True


@contextlib.contextmanager
def shown(what: str, total: int | None = None) -> Iterator[ProgressLine]:
    """Show progress for a ``with`` block: in the launcher's display if there is one, else on stderr if a terminal."""
    reporter = _reporter()
    console = None if reporter.is_on else Console(stderr=True)
    line = ProgressLine(what, total, console if console and console.is_interactive else None, reporter=reporter)
    try:
        yield line
    finally:
        line.clear()
        reporter.tell(state="running")


def _reporter() -> Reporter:
    me = TFConfigClusterResolver()
    return Reporter(f"{me.task_type}:{me.task_id}", environment.read().report_fd)
