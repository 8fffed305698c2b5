"""Where a model_dir lies: the same for a folder, a file:// URL and what fsspec reaches (here memory://)."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import fsspec
import pytest

from paramserver.checkpoint.storage import LocalStorage, RemoteStorage, join, local_copy, local_file, split, storage_of
from paramserver.errors import ConfigError


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
    with pytest.raises(ConfigError, match=f"{place.replace('+', '.')}: fsspec cannot open it: .*"):
        storage_of(place)


def test_it_shows_where_it_is():
    assert repr(storage_of("run")) == "LocalStorage('run')"
    assert repr(storage_of("memory://run")) == "RemoteStorage('memory://run')"


# --- files


def test_a_new_file_comes_into_place_with_the_end(storage, place):
    for content in ("one", "two"):
        with storage.new_file("trace.json") as path:
            path.write_text(content)
            assert storage.has("trace.json") == (content == "two")
    assert storage_of(place).read("trace.json") == b"two"
    assert storage.names() == ["trace.json"]


def test_a_new_file_that_fails_leaves_the_old_one(storage):
    storage.replace("trace.json", b"old")
    with contextlib.suppress(ZeroDivisionError), storage.new_file("trace.json") as path:
        path.write_text("new")
        _ = 1 / 0
    assert (storage.names(), storage.read("trace.json")) == (["trace.json"], b"old")


def test_a_file_is_no_folder(storage):
    storage.replace("checkpoint", b"")
    put(storage, "ckpt-5", index="i")
    assert [storage.is_file(name) for name in ("checkpoint", "ckpt-5", "nothing")] == [True, False, False]


def test_a_folder_may_hold_folders(storage):
    folder = storage.new_folder("1700000001")
    for name in ("index", "assets.extra/deep/words"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    storage.publish(folder, "1700000001", last="index")
    assert sorted(storage_of(storage.path("1700000001")).names()) == ["assets.extra", "index"]
    assert storage_of(join(storage.path("1700000001"), "assets.extra", "deep")).read("words")


def test_of_an_upload_that_fails_nothing_stays(tmp_path, monkeypatch):
    storage = RemoteStorage(f"memory://{tmp_path}/run")
    upload = storage._upload
    monkeypatch.setattr(storage, "_upload", lambda file, name: 1 / 0 if "index" in name else upload(file, name))
    with pytest.raises(ZeroDivisionError):
        put(storage, "ckpt-5", index="", values="")
    assert storage.names() == []


@pytest.mark.parametrize("run", ["run", "[run] *"])
def test_files_below_a_folder_are_fetched_by_a_pattern(tmp_path, run):
    place = f"memory://{tmp_path}/{run}"
    for name in ("eval/a.tfevents.1", "eval/notes", "eval/deep/b.tfevents.2", "c.tfevents.3"):
        folder, file = split(join(place, name))
        storage_of(folder).replace(file, name.encode())
    for pattern, expected in {"*.tfevents.*": ["c.tfevents.3"], "eval/*.tfevents.*": ["eval/a.tfevents.1"]}.items():
        with local_copy(place, pattern) as folder:
            found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}
        assert found == {name: name for name in expected}


def test_where_there_is_nothing_a_copy_is_empty(place):
    with local_copy(place) as folder:
        assert not list(folder.glob("*"))


def test_one_file_is_fetched_whatever_its_name(storage, place):
    for name in ("a[1]*", "a1b"):
        storage.replace(name, name.encode())
    with local_file(place, "a[1]*") as file:
        assert file.read_text() == "a[1]*"
        assert "memory://" not in place or [path.name for path in file.parent.iterdir()] == ["a[1]*"]


@pytest.mark.parametrize(
    "path", ["memory://file", "memory://run/file", "run/file", "file", "/run/file/", "file:///run/file"]
)
def test_a_path_is_split_into_a_folder_and_a_name(path):
    folder, name = split(path)
    assert name == "file"
    assert storage_of(folder).path(name) == join(path)
