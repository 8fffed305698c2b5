"""The state file of a model_dir and what it retains (B02, B03, B04, B07, Q09, Q17)."""

import json
import logging
import shutil
from pathlib import Path

import fsspec
import pytest

import paramserver.checkpoint.model_dir
from paramserver.checkpoint.model_dir import (
    INDEX_FILE,
    CheckpointManager,
    checkpoint_step,
    checkpoint_to_restore,
    exists,
    latest_checkpoint,
    read_state,
)
from paramserver.checkpoint.storage import join, storage_of
from paramserver.errors import CheckpointError, ConfigError

HOUR = 3600


class Clock:
    """A wall clock that moves by hand."""

    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture(params=["folder", "file://", "memory://"])
def model_dir(request, tmp_path):
    """A model_dir that is not there yet, as the three kinds of places name it."""
    yield f"{request.param.removeprefix('folder')}{tmp_path}/run"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def kept(model_dir):
    """The checkpoints that are there, whole or not."""
    return sorted(name for name in storage_of(model_dir).names() if name.startswith("ckpt-"))


def save(manager, step):
    folder = Path(manager.temporary_path(step))
    (folder / INDEX_FILE).write_text("{}")
    return manager.publish(str(folder), step)


def folders(model_dir):
    return sorted(path.name for path in Path(model_dir).iterdir() if path.is_dir())


def test_b02_the_state_names_latest_and_retained_by_relative_names(model_dir):
    manager = CheckpointManager(model_dir)
    assert latest_checkpoint(model_dir) is None
    assert read_state(model_dir) is None
    assert [save(manager, step) for step in (0, 5)] == [manager.save_path(0), manager.save_path(5)]
    state = json.loads(storage_of(model_dir).read("checkpoint"))
    assert (state["latest"], state["retained"], state["finished"]) == ("ckpt-5", ["ckpt-0", "ckpt-5"], False)
    assert latest_checkpoint(model_dir) == checkpoint_to_restore(model_dir) == join(model_dir, "ckpt-5")
    assert kept(model_dir) == ["ckpt-0", "ckpt-5"]


def test_q09_a_model_dir_can_be_moved(tmp_path):
    save(CheckpointManager(str(tmp_path / "a")), 5)
    (tmp_path / "a").rename(tmp_path / "b")
    assert latest_checkpoint(str(tmp_path / "b")) == str(tmp_path / "b" / "ckpt-5")


def test_b02_latest_is_none_where_its_files_are_gone(tmp_path):
    manager = CheckpointManager(str(tmp_path))
    save(manager, 1)
    path = Path(save(manager, 2))
    (path / INDEX_FILE).unlink()
    assert latest_checkpoint(str(tmp_path)) is None
    shutil.rmtree(path)
    assert latest_checkpoint(str(tmp_path)) is None
    assert CheckpointManager(str(tmp_path)).state.retained == ("ckpt-1",)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"latest": 3}', b'{"latest": "../ckpt-1"}', b'{"retained": ["a"]}'],
)
def test_b02_an_unreadable_state_is_a_warning_and_no_checkpoint(tmp_path, caplog, content):
    (tmp_path / "checkpoint").write_bytes(content)
    assert latest_checkpoint(str(tmp_path)) is None
    assert "taken as if there were no checkpoint" in caplog.text
    save(CheckpointManager(str(tmp_path)), 3)
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "ckpt-3")


@pytest.mark.parametrize(
    ("keep_max", "expected"), [(2, ["ckpt-8", "ckpt-10"]), (1, ["ckpt-10"]), (None, None), (0, None)]
)
def test_b03_the_oldest_are_deleted_first(model_dir, keep_max, expected):
    manager = CheckpointManager(model_dir, keep_max=keep_max)
    for step in (0, 9, 8, 10):
        save(manager, step)
    expected = ["ckpt-0", "ckpt-9", "ckpt-8", "ckpt-10"] if expected is None else expected
    assert list(manager.state.retained) == expected
    assert kept(model_dir) == sorted(expected)


def test_b03_one_checkpoint_of_each_period_is_spared(model_dir):
    clock = Clock()
    spared = []
    for step in range(10):
        # A new manager each time: what is spared does not depend on restarts.
        save(CheckpointManager(model_dir, keep_max=1, keep_every_n_hours=2, clock=clock), step)
        clock.now += 0.75 * HOUR
        spared = [name for name in kept(model_dir) if name != f"ckpt-{step}"]
    assert spared == ["ckpt-3", "ckpt-6"]


def test_without_a_period_none_is_spared(model_dir):
    clock = Clock()
    for step in range(4):
        save(CheckpointManager(model_dir, keep_max=1, keep_every_n_hours=None, clock=clock), step)
        clock.now += 10_000 * HOUR
    assert kept(model_dir) == ["ckpt-3"]


def test_b03_a_failed_deletion_is_a_warning(tmp_path, caplog, monkeypatch):
    def fail(path):
        raise PermissionError(13, "not allowed", str(path))

    manager = CheckpointManager(str(tmp_path), keep_max=1)
    save(manager, 1)
    monkeypatch.setattr(paramserver.checkpoint.model_dir.shutil, "rmtree", fail)
    save(manager, 2)
    assert "cannot be deleted" in caplog.text
    assert manager.state.retained == ("ckpt-2",)
    monkeypatch.undo()
    manager.remove_leftovers()
    assert folders(tmp_path) == ["ckpt-2"]


def test_b03_a_checkpoint_that_is_gone_already_is_no_matter(tmp_path, caplog):
    manager = CheckpointManager(str(tmp_path), keep_max=1)
    shutil.rmtree(save(manager, 1))
    save(manager, 2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_checkpoint_without_its_index_is_not_published(tmp_path):
    manager = CheckpointManager(str(tmp_path))
    save(manager, 1)
    with pytest.raises(CheckpointError, match="is cut short"):
        manager.publish(manager.temporary_path(2), 2)
    assert latest_checkpoint(str(tmp_path)) == manager.save_path(1)


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    manager = CheckpointManager(str(tmp_path))
    save(manager, 1)
    manager.temporary_path(2)
    (tmp_path / "checkpoint.tmp-1234").write_text("{")
    (tmp_path / "eval").mkdir()
    CheckpointManager(str(tmp_path)).remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "ckpt-1", "eval"]


def test_what_was_uploaded_in_part_is_a_leftover_unless_the_state_names_it(tmp_path):
    storage = storage_of(model_dir := f"memory://{tmp_path}/run")
    manager = CheckpointManager(model_dir)
    save(manager, 1)
    save(manager, 2)
    for half in ("ckpt-2", "ckpt-3"):
        storage_of(storage.path(half)).replace("model-00001-of-00001.safetensors", b"")
    storage_of(storage.path("ckpt-2")).delete(INDEX_FILE)
    CheckpointManager(model_dir).remove_leftovers()
    assert kept(model_dir) == ["ckpt-1", "ckpt-2"]
    with pytest.raises(CheckpointError, match="ckpt-2 is cut short"):
        checkpoint_to_restore(model_dir)
    for name in storage.names():
        storage.delete(name)


def test_what_was_not_written_to_its_end_is_discarded(model_dir):
    manager = CheckpointManager(model_dir)
    folder = manager.temporary_path(3)
    manager.discard(folder)
    assert not Path(folder).exists()
    assert kept(model_dir) == []


def test_b04_a_checkpoint_that_was_deleted_is_told_from_one_that_is_damaged(model_dir):
    path = save(CheckpointManager(model_dir), 1)
    assert exists(path)
    storage_of(model_dir).delete("ckpt-1", INDEX_FILE)
    assert not exists(path)


def test_a_folder_of_a_lost_state_is_replaced(tmp_path):
    stale = Path(save(CheckpointManager(str(tmp_path)), 4)) / "stale"
    stale.touch()
    (tmp_path / "checkpoint").unlink()
    manager = CheckpointManager(str(tmp_path))
    assert not manager.is_saved(4)
    save(manager, 4)
    assert not stale.exists()
    assert manager.is_saved(4)
    assert folders(tmp_path) == ["ckpt-4"]


def test_the_one_before_is_the_latest_while_a_step_is_saved_anew(model_dir, monkeypatch):
    """Whoever is killed in between starts from that one, not from the beginning."""
    manager = CheckpointManager(model_dir)
    for step in (1, 2, 2):
        save(manager, step)
    assert read_state(model_dir).retained == ("ckpt-1", "ckpt-2")
    assert checkpoint_to_restore(model_dir) == join(model_dir, "ckpt-2")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(manager._storage, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        save(manager, 2)
    assert checkpoint_to_restore(model_dir) == join(model_dir, "ckpt-1")


def test_a_reader_never_sees_a_part_of_the_state(tmp_path, monkeypatch):
    manager = CheckpointManager(str(tmp_path))
    save(manager, 1)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match="No space left on device; check that model_dir") as caught:
        manager.mark_finished("run")
    assert caught.value.path == str(tmp_path / "checkpoint")
    assert latest_checkpoint(str(tmp_path)) == manager.save_path(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "ckpt-1"]


def test_a_model_dir_that_is_a_file_is_a_checkpoint_error(tmp_path):
    (tmp_path / "run").touch()
    manager = CheckpointManager(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        manager.mark_started("a")
    with pytest.raises(CheckpointError, match="cannot be written"):
        manager.temporary_path(0)


def test_v31_the_end_of_a_run_is_told_through_the_state(tmp_path):
    clock = Clock()
    manager = CheckpointManager(str(tmp_path), clock=clock)
    manager.mark_started("first")
    save(manager, 1)
    assert not read_state(str(tmp_path)).finished
    manager.mark_finished("first")
    state = read_state(str(tmp_path))
    assert (state.finished, state.run_id, state.finished_at) == (True, "first", clock.now)
    CheckpointManager(str(tmp_path)).mark_started("second")
    state = read_state(str(tmp_path))
    assert (state.finished, state.run_id, state.finished_at) == (False, "second", None)
    assert state.latest == "ckpt-1"


def test_b07_the_step_is_in_the_name():
    assert checkpoint_step("/runs/a/ckpt-120") == 120
    with pytest.raises(CheckpointError, match="expected a folder named ckpt-STEP"):
        checkpoint_step("/runs/a/model")


@pytest.mark.parametrize("wrong", [{"keep_max": -1}, {"keep_every_n_hours": 0}])
def test_limits_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CheckpointManager(str(tmp_path), **wrong)
