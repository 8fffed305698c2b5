"""Summaries at a URL: event files are written locally and uploaded."""

import tempfile
from pathlib import Path

import pytest

from paramserver.checkpoint.storage import RemoteStorage, storage_of
from paramserver.errors import ConfigError
from paramserver.estimator import read_eval_metrics
from paramserver.estimator.uploading import UPLOAD_INTERVAL, UploadingWriter, summary_writer
from paramserver.summary import SummaryWriter


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A URL; what is local is gone afterwards."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield f"memory://{tmp_path}/run"
    assert not list((tmp_path / "temporary").iterdir())


def test_points_are_there_after_a_flush_and_after_the_end(place):
    with summary_writer(place) as writer:
        writer.scalar("loss", 2.0, 1)
        assert read_eval_metrics(place) == {}
        writer.flush()
        assert read_eval_metrics(place) == {1: {"loss": 2.0}}
        writer.scalar("loss", 1.0, 2)
    assert read_eval_metrics(place) == {1: {"loss": 2.0}, 2: {"loss": 1.0}}
    assert len(storage_of(place).names()) == 1
    writer.close()
    with pytest.raises(RuntimeError, match="after its writer was closed"):
        writer.scalar("loss", 0.5, 3)


def test_points_are_there_after_two_minutes_with_the_next_one(place):
    now = 0.0
    with UploadingWriter(place, clock=lambda: now) as writer:
        found = []
        for step, now in enumerate([1.0, UPLOAD_INTERVAL, UPLOAD_INTERVAL + 1, 2 * UPLOAD_INTERVAL]):  # noqa: B007
            writer.scalar("loss", 1.0, step)
            found.append(list(read_eval_metrics(place)))
    assert found == [[], [0], [0], [0, 1, 2]]


def test_what_is_never_used_leaves_nothing(place):
    with summary_writer(place) as writer:
        writer.flush()
    assert storage_of(place).names() == []


def test_an_upload_that_fails_is_an_error_and_leaves_nothing_here(place, monkeypatch):
    def fail(*_):
        raise PermissionError("the bucket is not ours")

    monkeypatch.setattr(RemoteStorage, "_upload", fail)
    writer = summary_writer(place)
    writer.scalar("loss", 1.0, 1)
    for action in (writer.flush, writer.close):
        with pytest.raises(PermissionError, match="the bucket is not ours"):
            action()
    writer.close()


@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_a_folder_is_written_as_ever(tmp_path, url):
    with summary_writer(url.format(tmp_path)) as writer:
        writer.scalar("loss", 1.0, 1)
        writer.flush()
        assert type(writer) is SummaryWriter
        assert len(list(Path(tmp_path).glob("events.out.tfevents.*"))) == 1


def test_it_shows_where_it_writes_to(place):
    with summary_writer(place) as writer:
        assert repr(writer) == f"SummaryWriter('{place}', unused)"


def test_a_url_that_nobody_knows_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match="nobody://run: fsspec cannot open it"):
        summary_writer("nobody://run")
