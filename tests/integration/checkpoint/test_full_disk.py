"""A disk that is full, a folder that is gone, a storage that answers with errors of its own."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import paramserver as ps
from paramserver.errors import CheckpointError
from paramserver.estimator import Estimator, EstimatorSpec, RunConfig
from paramserver.estimator.uploading import UploadingWriter
from paramserver.summary import SummaryWriter


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only the superuser may mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)  # noqa: S607  # found as `mount` was


def fill(folder):
    """Leave no room on a disk."""
    with (folder / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass


def prepared():
    strategy, model = ps.ParameterServerStrategy(), torch.nn.Linear(4, 4)
    model, optimizer = strategy.prepare(model, torch.optim.Adam(model.parameters()))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return strategy


def test_a_save_on_a_full_disk_is_one_clear_error_and_the_next_one_works(small_disk):
    strategy = prepared()
    fill(small_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        strategy.save(small_disk / "run")
    (small_disk / "ballast").unlink()
    path = strategy.save(small_disk / "run")
    assert strategy.latest_checkpoint(small_disk / "run") == path
    strategy.close()


def test_a_model_dir_that_was_removed_is_made_again(tmp_path):
    strategy = prepared()
    strategy.save(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    path = strategy.save(tmp_path / "run")
    assert strategy.latest_checkpoint(tmp_path / "run") == path
    strategy.close()


class StorageError(Exception):
    """An error of a storage that is no OSError, as some of fsspec's have."""


def test_an_error_of_a_storage_that_fsspec_reaches_is_a_checkpoint_error(monkeypatch):
    def refuse(*_, **__):
        raise StorageError("429: too many requests")

    strategy = prepared()
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "put_file", refuse)
        with pytest.raises(CheckpointError, match="429: too many requests"):
            strategy.save("memory://full_disk/run")
        writer = UploadingWriter("memory://full_disk/run")
        writer.scalar("loss", 1.0, 1)
        with pytest.raises(OSError, match="StorageError: 429: too many requests"):
            writer.close()
    assert strategy.save("memory://full_disk/run")
    strategy.close()


def losses(folder):
    """The steps of the points that a reader finds in all event files together."""
    events = EventAccumulator(str(folder)).Reload()
    return [point.step for point in events.Scalars("loss")] if "loss" in events.Tags()["scalars"] else []


def write_until_it_fails(writer):
    for step in range(2, 10_000):
        writer.scalar("loss", 1.0, step)
        writer.flush()


def test_summaries_on_a_full_disk_are_an_error_and_then_go_on_in_a_new_file(small_disk):
    threads = threading.active_count()
    writer = SummaryWriter(str(small_disk / "run"))
    writer.scalar("loss", 1.0, 1)
    writer.flush()
    fill(small_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write_until_it_fails(writer)
    (small_disk / "ballast").unlink()
    writer.scalar("loss", 1.0, 10_000)
    writer.close()
    found = [point for file in sorted((small_disk / "run").iterdir()) for point in losses(file)]
    assert (found[0], found[-1]) == (1, 10_000)
    assert len(list((small_disk / "run").iterdir())) == 2
    assert threading.active_count() == threads


def test_summaries_whose_folder_was_removed_are_an_error_and_then_go_on(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.scalar("loss", 1.0, 1)
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(FileNotFoundError, match="the event file was deleted"):
            writer.flush()
        writer.scalar("loss", 1.0, 2)
    assert losses(tmp_path / "run") == [2]


def test_an_estimator_trains_on_while_its_disk_is_full(small_disk, caplog):
    def model_fn(mode):
        model = torch.nn.Linear(4, 4)
        return EstimatorSpec(
            mode,
            model=model,
            loss_fn=lambda model, features, labels: model(features).sum(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )

    def batches():
        for step in range(20):
            if step == 5:
                fill(small_disk)
            if step == 15:
                (small_disk / "ballast").unlink()
            yield torch.ones(1, 4), torch.ones(1)

    config = RunConfig(model_dir=str(small_disk / "run"), save_checkpoints_steps=2, save_summary_steps=2)
    with caplog.at_level(logging.ERROR):
        Estimator(model_fn, config=config).train(batches)
    failed = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [message for message in failed if message.startswith("no checkpoint of step")]
    assert all("No space left on device" in message for message in failed)
    assert not [record for record in caplog.records if record.exc_info]
    assert ps.ParameterServerStrategy.latest_checkpoint(small_disk / "run").endswith("ckpt-20")
