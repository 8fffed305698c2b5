"""Summaries are TensorBoard's event files, and cost nothing until the first point (B05, N10)."""

import runpy
import sys
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paramserver.estimator import summary
from paramserver.estimator.summary import SummaryWriter


def test_points_can_be_read_back(tmp_path):
    threads = threading.active_count()
    writer = SummaryWriter(str(tmp_path / "run"))
    for step in (1, 2):
        writer.scalar("loss", 0.5 * step, step)
    writer.flush()
    assert "open" in repr(writer)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    writer.close()
    writer.close()
    assert threading.active_count() == threads


def test_b05_a_writer_that_is_not_used_leaves_nothing(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run"))
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_refuses(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.close()
    with pytest.raises(RuntimeError, match="after its writer was closed"):
        writer.scalar("loss", 1.0, 1)


def test_tensorboard_is_imported_by_the_first_point_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fresh = runpy.run_path(summary.__file__)
    writer = fresh["SummaryWriter"](str(tmp_path))
    with pytest.raises(ImportError):
        writer.scalar("loss", 1.0, 1)
