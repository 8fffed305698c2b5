"""Where a model_dir lies: the same for a folder, a file:// URL and what fsspec reaches (here memory://)."""

import shutil
import tempfile
from pathlib import Path

import fsspec
import pytest

from paramserver.errors import ConfigError
from paramserver.estimator.storage import LocalStorage, RemoteStorage, join, local_copy, storage_of


@pytest.fixture(params=["folder", "file://", "memory://"])
def place(request, tmp_path, monkeypatch):
    """A place for a model_dir that is not there yet."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    if request.param == "memory://":
        yield f"memory://{tmp_path}/run"
        fsspec.filesystem("memory").store.clear()
        fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    else:
        yield f"{request.param.removeprefix('folder')}{tmp_path}/run"
    assert not list((tmp_path / "temporary").iterdir())


@pytest.fixture
def storage(place):
    return storage_of(place)


def put(storage, name, **files):
    folder = storage.new_folder(name)
    for file, text in files.items():
        (folder / file).write_text(text)
    storage.publish(folder, name, last="index")


def test_a_place_that_is_not_there_is_empty(storage):
    assert storage.names() == []
    assert not storage.has("checkpoint")
    with pytest.raises(FileNotFoundError):
        storage.read("checkpoint")
    storage.delete("checkpoint")


def test_a_file_is_replaced(storage, place):
    for content in (b"one", b"two"):
        storage.replace("checkpoint", content)
        assert storage_of(place).read("checkpoint") == content
    assert storage.names() == ["checkpoint"]


def test_a_folder_is_put_in_place_fetched_and_deleted(storage, place):
    storage.replace("checkpoint", b"")
    put(storage, "ckpt-5", index="i", values="v")
    assert sorted(storage.names()) == ["checkpoint", "ckpt-5"]
    assert storage_of(storage.path("ckpt-5")).has("index")
    with local_copy(join(place, "ckpt-5")) as folder:
        assert {file.name: file.read_text() for file in folder.iterdir()} == {"index": "i", "values": "v"}
    storage.delete("ckpt-5", "index")
    assert storage.names() == ["checkpoint"]
    assert not storage_of(storage.path("ckpt-5")).has("index")


def test_a_folder_that_is_not_published_can_be_deleted(storage):
    folder = storage.new_folder("ckpt-5")
    assert folder.is_absolute()
    shutil.rmtree(folder)
    assert "ckpt-5" not in storage.names()


def test_the_index_is_uploaded_last_and_deleted_first(monkeypatch):
    storage = RemoteStorage("memory://order/run")
    order = []
    for name in ("put_file", "rm"):
        monkeypatch.setattr(storage._files, name, lambda *paths, **_: order.append(Path(paths[-1]).name))
    put(storage, "ckpt-5", zeta="", index="", alpha="")
    storage.delete("ckpt-5", "index")
    assert order == ["alpha", "zeta", "index", "index", "ckpt-5"]


def test_what_is_needed_is_fetched_only():
    storage = RemoteStorage("memory://parts/run")
    put(storage, "ckpt-5", index="", model="", optimizer="")
    with local_copy("memory://parts/run/ckpt-5", "model") as folder:
        assert [file.name for file in folder.iterdir()] == ["model"]
    storage.delete("ckpt-5")


def test_a_folder_comes_into_place_in_one_move(tmp_path, monkeypatch):
    storage = LocalStorage(str(tmp_path))
    monkeypatch.setattr(Path, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        put(storage, "ckpt-5", index="")
    assert "ckpt-5" not in storage.names()


@pytest.mark.parametrize("place", ["nobody://run", "gs+nothing://run"])
def test_a_url_that_nobody_knows_is_an_error_of_the_configuration(place):
    with pytest.raises(ConfigError, match=f"model_dir {place.replace('+', '.')}: fsspec cannot open it: .*"):
        storage_of(place)


def test_it_shows_where_it_is():
    assert repr(storage_of("run")) == "LocalStorage('run')"
    assert repr(storage_of("memory://run")) == "RemoteStorage('memory://run')"
