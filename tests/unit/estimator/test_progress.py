"""The line that says how far an evaluation is: on a terminal, and gone at the end, or in the launcher's display."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from paramserver.cluster.report import decode
from paramserver.estimator import Estimator, EstimatorSpec, ModeKeys, progress
from paramserver.estimator.progress import ProgressLine

ERASED = "\r\x1b[2K"


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, force_interactive=True, color_system=None, width=width)
    return console, stream


def test_it_counts_batches_and_is_drawn_now_and_then() -> None:
    console, stream = terminal()
    clock = Clock()
    line = ProgressLine("evaluating ckpt-5", 8, console, clock)
    for _ in line.watch(iter(range(8))):
        clock.now += 0.125
    assert stream.getvalue() == "".join(
        f"{ERASED if done > 2 else ''}evaluating ckpt-5: {done} of 8 batches, 8.0 batches/s" for done in (2, 4, 6)
    )
    line.clear()
    line.clear()
    assert stream.getvalue().endswith(f"batches/s{ERASED}")
    assert stream.getvalue().count(ERASED) == 3


def test_what_is_too_long_for_the_terminal_is_cut() -> None:
    console, stream = terminal(width=20)
    clock = Clock()
    line = ProgressLine("evaluating ckpt-123456", None, console, clock)
    clock.now += 1
    next(line.watch(iter([1])))
    assert stream.getvalue() == "evaluating ckpt-123"


def test_without_a_terminal_it_counts_in_silence() -> None:
    line = ProgressLine("predicting", None, None)
    assert list(line.watch(iter("abc"))) == ["a", "b", "c"]
    assert line.done == 3
    line.clear()


class TestOnATerminal:
    """What `Console(stderr=True)` finds is played."""

    @pytest.fixture(autouse=True)
    def stream(self, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
        monkeypatch.delenv("TF_CONFIG", raising=False)
        monkeypatch.delenv("PARAMSERVER_REPORT_FD", raising=False)
        console, stream = terminal()
        monkeypatch.setattr(progress, "Console", lambda stderr: console)
        monkeypatch.setattr(progress, "INTERVAL", 0.0)
        return stream

    @pytest.fixture
    def estimator(self, tmp_path: Path) -> Estimator:
        def model_fn(mode: ModeKeys) -> EstimatorSpec:
            return EstimatorSpec(mode, model=nn.Identity(), loss_fn=lambda model, x, y: model(x).mean())

        return Estimator(model_fn, str(tmp_path))

    def test_an_evaluation_is_shown(self, estimator: Estimator, stream: io.StringIO) -> None:
        estimator.evaluate(lambda: [(torch.zeros(2, 1), None)] * 2, steps=2)
        assert "evaluating a model without a checkpoint: 1 of 2 batches" in stream.getvalue()
        assert stream.getvalue().endswith(ERASED)

    def test_a_prediction_is_shown_while_it_computes_only(self, estimator: Estimator, stream: io.StringIO) -> None:
        for _ in estimator.predict(lambda: [torch.zeros(2, 1)] * 2):
            assert stream.getvalue().endswith(ERASED)
        assert "predicting with a model without a checkpoint: 1 batches" in stream.getvalue()

    def test_a_failure_leaves_no_line(self, estimator: Estimator, stream: io.StringIO) -> None:
        with pytest.raises(AttributeError):
            estimator.evaluate(lambda: [("text", None)])
        assert stream.getvalue().endswith(ERASED)

    def test_a_terminal_that_cannot_be_drawn_on_shows_nothing(
        self, estimator: Estimator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = io.StringIO()
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=stream, force_terminal=True))
        estimator.evaluate(lambda: [(torch.zeros(2, 1), None)])
        assert not stream.getvalue()

    def test_a_launcher_that_shows_the_run_is_told_and_left_the_terminal(
        self, estimator: Estimator, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read, write = os.pipe()
        monkeypatch.setenv("PARAMSERVER_REPORT_FD", str(write))
        monkeypatch.setenv("TF_CONFIG", '{"cluster": {"chief": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}')
        estimator.evaluate(lambda: [(torch.zeros(2, 1), None)] * 2, steps=2)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            first, *_, last = map(decode, pipe)
        assert not stream.getvalue()
        assert first.task == "evaluator:0"
        assert first.state is not None
        assert first.state.startswith("evaluating a model without a checkpoint: 0 of 2 batches")
        assert last.state == "running"
