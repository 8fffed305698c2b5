"""The folders of exported models at a URL: whole or not there, and deleted; test_exporters has those on a disk."""

import logging
import tempfile
from pathlib import Path

import pytest

from paramserver.checkpoint.storage import RemoteStorage, join, storage_of
from paramserver.estimator.export import folder
from paramserver.estimator.export.folder import delete_export, delete_old_exports, new_export


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A URL; nothing of it stays here."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield f"memory://{tmp_path}/export"
    assert not list((tmp_path / "temporary").iterdir())


def write(folder):
    for name in ("signature.json", "model.safetensors", "assets.extra/words"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def test_a_model_is_whole_with_its_weights_which_come_last(place, monkeypatch):
    uploaded = []
    upload = RemoteStorage._upload
    monkeypatch.setattr(RemoteStorage, "_upload", lambda self, *file: (uploaded.append(file[1]), upload(self, *file)))
    path = new_export(place, write)
    name = Path(path).name
    assert (path, len(name)) == (join(place, name), 10)
    assert uploaded == [f"{name}/{file}" for file in ("assets.extra/words", "signature.json", "model.safetensors")]
    assert storage_of(join(path, "assets.extra")).read("words") == b"assets.extra/words"


@pytest.mark.parametrize("of", ["{}", "memory://{}"])
def test_j02_of_the_models_of_one_second_the_newest_stays(tmp_path, monkeypatch, of):
    monkeypatch.setattr(folder.time, "time", lambda: 1_700_000_000.5)
    place, kept = of.format(tmp_path / "export"), []
    for _ in range(3):
        path = new_export(place, write)
        delete_old_exports(place, 1)
        assert [join(place, name) for name in storage_of(place).names()] == [path]
        kept.append(Path(path).name)
    assert kept == ["1700000000", "1700000001", "1700000002"]


def test_of_a_model_that_cannot_be_uploaded_nothing_stays(place, monkeypatch):
    upload = RemoteStorage._upload

    def fail(self, file, name):
        if name.endswith("model.safetensors"):
            raise PermissionError("the bucket is full")
        upload(self, file, name)

    monkeypatch.setattr(RemoteStorage, "_upload", fail)
    with pytest.raises(PermissionError, match="the bucket is full"):
        new_export(place, write)
    assert storage_of(place).names() == []


def test_what_is_not_written_to_its_end_is_not_uploaded(place):
    with pytest.raises(ZeroDivisionError):
        new_export(place, lambda folder: (write(folder), 1 / 0))
    assert storage_of(place).names() == []


def test_j02_j05_the_newest_are_kept_and_nothing_else_is_touched(place):
    for name in ("1700000001", "1700000002", "notes"):
        storage_of(join(place, name)).replace("model.safetensors", b"")
    storage_of(place).replace("1600000000", b"a file")
    delete_old_exports(f"{place}/", None)
    delete_old_exports(f"{place}/", 1)
    assert sorted(storage_of(place).names()) == ["1600000000", "1700000002", "notes"]


def test_a_model_that_is_deleted_loses_first_what_makes_it_whole(place, monkeypatch):
    path = new_export(place, write)
    files, deleted = RemoteStorage(path)._files, []
    monkeypatch.setattr(files, "rm", lambda path, recursive: deleted.append(Path(path).name))
    delete_export(path)
    assert deleted == ["model.safetensors", Path(path).name]


def test_j05_a_model_that_is_gone_is_warned_of(place, caplog):
    delete_old_exports(place, 1)
    assert not caplog.records
    delete_export(join(place, "1700000001"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"the old export {place}/1700000001 cannot be deleted: [Errno 2] No such file" in record.message
