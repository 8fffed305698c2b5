"""The progress of a loop of one's own."""

from __future__ import annotations

import os

import pytest
import torch

from paramserver.cluster.report import Report, Reporter, decode
from paramserver.distribute.progress import LOG_INTERVAL, REPORT_INTERVAL, LoopProgress


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Unread:
    """A loss that must not be read."""

    def __float__(self) -> float:
        raise AssertionError("a loss is read only where it is shown")


def test_a_launcher_gets_a_report_a_few_times_a_second() -> None:
    reader, writer = os.pipe()
    clock = Clock()
    progress = LoopProgress("chief:0", Reporter("chief:0", writer), clock)
    progress.report(1, torch.tensor([2.5]), 10)
    progress.report(2, Unread(), 10)  # type: ignore[arg-type]  # stands for a tensor
    clock.now += REPORT_INTERVAL
    progress.report(3, 1.5, 10)
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        assert [decode(line) for line in lines] == [
            Report(task="chief:0", state="training", global_step=1, loss=2.5, max_steps=10),
            Report(task="chief:0", state="training", global_step=3, loss=1.5, max_steps=10),
        ]


def test_without_a_launcher_there_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    clock = Clock()
    progress = LoopProgress("worker:1", Reporter("worker:1", None), clock)
    progress.report(500, Unread(), None)  # type: ignore[arg-type]  # stands for a tensor
    clock.now += LOG_INTERVAL
    progress.report(1000, 0.25, 5000)
    clock.now += LOG_INTERVAL
    progress.report(2000, None, None)
    assert caplog.messages == [
        "worker:1: global step 1,000 of 5,000, 100 steps/s, loss 0.25",
        "worker:1: global step 2,000, 100 steps/s",
    ]
