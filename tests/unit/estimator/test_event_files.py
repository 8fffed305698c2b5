"""What is read of event files (Y08)."""

import logging
import math

import pytest

from paramserver.checkpoint.storage import join, storage_of
from paramserver.estimator import read_eval_metrics
from paramserver.estimator.event_files import read_metrics
from paramserver.summary import SummaryWriter


def write(folder, results):
    """One event file."""
    writer = SummaryWriter(str(folder))
    for step, metrics in results.items():
        for name, value in metrics.items():
            writer.scalar(name, value, step)
    writer.close()
    (file,) = folder.glob("events.out.tfevents.*")
    return file


@pytest.fixture
def eval_dir(tmp_path):
    folder = tmp_path / "eval"
    file = write(tmp_path / "second", {30: {"loss": 3.0}, 20: {"loss": 2.5, "accuracy": 0.25}})
    earlier = write(tmp_path / "first", {10: {"loss": 1.0}, 20: {"loss": 2.0, "error": 7.0}})
    folder.mkdir()
    earlier.rename(folder / "events.out.tfevents.1000.host")
    file.rename(folder / "events.out.tfevents.2000.host")
    (folder / "notes.txt").write_text("no event file")
    return folder


def test_y08_steps_are_sorted_and_files_merged(eval_dir):
    metrics = read_eval_metrics(eval_dir)
    assert metrics == {
        10: {"loss": 1.0},
        20: {"loss": 2.5, "error": 7.0, "accuracy": 0.25},  # the later file says it better
        30: {"loss": 3.0},
    }
    assert list(metrics) == [10, 20, 30]


def test_y08_a_folder_that_is_missing_or_empty_gives_nothing(tmp_path):
    assert read_eval_metrics(str(tmp_path / "missing")) == {}
    assert read_eval_metrics(tmp_path) == {}


@pytest.mark.parametrize("damage", ["flipped", "cut", "all"])
def test_y08_what_cannot_be_read_ends_its_file_only(eval_dir, caplog, damage):
    """Whether a byte of it changed, its end is missing, or it never was an event file."""
    file = eval_dir / "events.out.tfevents.1000.host"
    content = file.read_bytes()
    flipped = content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]
    file.write_bytes({"flipped": flipped, "cut": content[:-3], "all": b"text" * 9}[damage])
    metrics = read_eval_metrics(eval_dir)
    whole = {20: {"loss": 2.5, "accuracy": 0.25}, 30: {"loss": 3.0}}
    assert metrics == (whole if damage == "all" else {10: {"loss": 1.0}, **whole})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{file} cannot be read beyond byte" in record.message


def test_what_is_no_scalar_is_left_out(tmp_path):
    from torch.utils.tensorboard import SummaryWriter as EventWriter

    with EventWriter(str(tmp_path)) as writer:
        writer.add_text("note", "some words", 10)
        writer.add_scalar("loss", 1.0, 10)
    assert read_eval_metrics(tmp_path) == {10: {"loss": 1.0}}


def test_a_file_that_grows_is_read_anew(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.scalar("loss", 1.0, 10)
    writer.flush()
    assert read_eval_metrics(tmp_path) == {10: {"loss": 1.0}}
    writer.scalar("loss", 0.5, 20)
    writer.close()
    assert read_eval_metrics(tmp_path) == {10: {"loss": 1.0}, 20: {"loss": 0.5}}


@pytest.mark.parametrize("value", [0.6, 0.1, 1e-30, 12345.678, -7.0, math.inf])
def test_y06_a_number_of_few_digits_is_read_as_it_was(tmp_path, value):
    """Though it is stored as float32, which of 0.6 makes a little more than 0.6."""
    write(tmp_path, {1: {"loss": value}})
    assert read_eval_metrics(tmp_path) == {1: {"loss": value}}


# --- at a URL


@pytest.mark.parametrize("url", ["file://{}", "memory://{}"])
def test_y08_evaluations_are_read_from_a_url(eval_dir, tmp_path, caplog, url):
    place = url.format(tmp_path / "run" / "eval")
    assert read_eval_metrics(place) == {}
    for file in eval_dir.iterdir():
        storage_of(place).replace(file.name, file.read_bytes())
    expected = read_eval_metrics(eval_dir)
    assert read_eval_metrics(place) == expected
    assert read_metrics(url.format(tmp_path / "run"), "eval/*.tfevents.*") == expected
    assert not caplog.records
    storage_of(place).replace("events.out.tfevents.1000.host", b"text" * 9)
    assert set(read_eval_metrics(place)) == {20, 30}
    assert f"{join(place)}/events.out.tfevents.1000.host cannot be read beyond byte" in caplog.text
