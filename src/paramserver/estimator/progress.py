"""A line on the terminal that says how far an evaluation or a prediction is, and goes away with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from paramserver.cluster import environment

T = TypeVar("T")

INTERVAL = 0.2
"""Seconds between two drawings."""

_ERASE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class ProgressLine:
    """Counts batches and shows their number and rate. Not thread-safe; starts no thread.

    Args:
        what: What is going on, such as ``evaluating ckpt-100``.
        total: How many batches there will be, None if nobody knows.
        console: Where it is shown; None shows nothing.
        clock: Returns seconds.
    """

    def __init__(
        self, what: str, total: int | None, console: Console | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._total = total
        self._console = console
        self._clock = clock
        self._began = self._drawn_at = clock()
        self._is_shown = False
        self.done = 0
        """Batches that were begun before the present one."""

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, counted as they are taken."""
        for batch in batches:
            self._draw()
            yield batch
            self.done += 1

    def clear(self) -> None:
        """Take the line away, until the next batch is taken. Idempotent."""
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
        if self._console is None or now - self._drawn_at < INTERVAL:
            return
        self.clear()
        text = str(self)[: self._console.width - 1]  # a full line would make the terminal begin another one
        self._console.print(Text(text, style="dim"), end="")
        self._drawn_at, self._is_shown = now, True


@contextlib.contextmanager
def shown(what: str, total: int | None = None) -> Iterator[ProgressLine]:
    """A line on stderr for a ``with`` block, where that is a terminal which no launcher draws on."""
    console = Console(stderr=True) if environment.read().report_fd is None else None
    line = ProgressLine(what, total, console if console is not None and console.is_terminal else None)
    try:
        yield line
    finally:
        line.clear()
