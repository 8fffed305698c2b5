"""The progress of a training loop of one's own: in the display of a launcher, or in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from paramserver.cluster.report import Reporter

logger = logging.getLogger(__name__)

REPORT_INTERVAL = 0.2
"""Seconds between two reports to a launcher."""
LOG_INTERVAL = 10.0
"""Seconds between two lines of the log."""


class LoopProgress:
    """Reports of one loop: a few times a second to a launcher, or else every few seconds to the log.

    Args:
        task: The task that trains.
        reporter: Reports to the launcher, if there is one.
        clock: Returns seconds that never decrease.
    """

    def __init__(self, task: str, reporter: Reporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._task, self._reporter, self._clock = task, reporter, clock
        self._interval = REPORT_INTERVAL if reporter.is_on else LOG_INTERVAL
        self._last = clock() - (self._interval if reporter.is_on else 0.0)
        self._last_step = 0

    def report(self, step: int, loss: float | torch.Tensor | None, max_steps: int | None) -> None:
        """Report a step, if it is time: the loss is not read otherwise, which would wait for its device."""
        now = self._clock()
        if now - self._last < self._interval:
            return
        value = None if loss is None else float(loss)
        if self._reporter.is_on:
            self._reporter.tell(state="training", global_step=step, loss=value, max_steps=max_steps)
        else:
            rate = (step - self._last_step) / (now - self._last)
            of = "" if max_steps is None else f" of {max_steps:,}"
            shown = "" if value is None else f", loss {value:.4g}"
            logger.info("%s: global step %s%s, %.0f steps/s%s", self._task, f"{step:,}", of, rate, shown)
        self._last, self._last_step = now, step
