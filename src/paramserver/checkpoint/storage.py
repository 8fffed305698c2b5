"""Storage for a model_dir: a file system that this task sees, or any other that fsspec reaches.

Rules
    * A place is a path, or an fsspec URL such as ``s3://bucket/run``. ``file://`` stands for a path.
    * A folder is written locally, by a task that sees it, and then put in place: renamed, or uploaded. One of its
      files, ``last``, comes into place last, so that it is there only when the folder is whole.
    * A folder is read locally, too: a remote folder is downloaded first, but only the files that are needed.
"""

from __future__ import annotations

import abc
import contextlib
import glob
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec

from paramserver.errors import ConfigError

_FILE = "file://"
ASIDE = ".tmp-"
"""Part of the names of files and folders that are not in place yet."""


def is_remote(path: str) -> bool:
    """Return whether a path is a URL of something other than local files.

    >>> is_remote("s3://bucket/run"), is_remote("/run"), is_remote("file:///run")
    (True, False, False)
    """
    return "://" in path and not path.startswith(_FILE)


def join(place: str, *names: str) -> str:
    """Return the path or URL of a file or folder in a place.

    >>> join("s3://bucket/run/", "eval"), join("run", "export", "best")
    ('s3://bucket/run/eval', 'run/export/best')
    """
    if is_remote(place):
        return "/".join([place.removesuffix("/"), *names])
    return str(Path(place.removeprefix(_FILE), *names))


def split(path: str) -> tuple[str, str]:
    """Return the parent folder of a path or URL, and the name in this folder.

    >>> split("s3://bucket/run/model.safetensors"), split("run/export/")
    (('s3://bucket/run/', 'model.safetensors'), ('run', 'export'))
    """
    if is_remote(path):
        name = path.rstrip("/").rpartition("/")[2]
        return path.rstrip("/").removesuffix(name), name
    local = Path(path.removeprefix(_FILE))
    return str(local.parent), local.name


def absolute(place: str) -> str:
    """Return a place in a form that another process finds from any working directory.

    >>> absolute("s3://bucket/run"), absolute("file:///run")
    ('s3://bucket/run', '/run')
    """
    return place if is_remote(place) else str(Path(join(place)).absolute())


def storage_of(place: str) -> Storage:
    """Return the storage of a place. Does not block.

    Raises:
        ConfigError: If fsspec does not support the URL, or needs a package for it that is not installed.
    """
    if not is_remote(place):
        return LocalStorage(place.removeprefix(_FILE))
    try:
        return RemoteStorage(place)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{place}: fsspec cannot open it: {error}") from error


@contextlib.contextmanager
def local_copy(folder: str, pattern: str = "*") -> Iterator[Path]:
    """Provide a folder locally: the folder itself, or a copy that lives as long as the context. Blocks.

    Args:
        folder: A path or URL. The copy is empty if there is nothing.
        pattern: Pattern for the files that are needed, such as ``"eval/*.tfevents.*"``; a copy holds no others.

    Raises:
        OSError: If the folder cannot be read.
    """
    with storage_of(folder).fetched(pattern) as local:
        yield local


@contextlib.contextmanager
def local_file(folder: str, name: str) -> Iterator[Path]:
    """Provide one file of a folder locally; see `local_copy`."""
    with local_copy(folder, glob.escape(name)) as local:
        yield local / name


class Storage(abc.ABC):
    """A folder and its content by name. Every method blocks, and raises OSError if it fails.

    Attributes:
        place: The path or URL of the folder.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    def path(self, name: str) -> str:
        """Return the path or URL of a name in the folder. Does not block."""
        return join(self.place, name)

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: If there is no such file.
        """

    @abc.abstractmethod
    def replace(self, name: str, content: bytes) -> None:
        """Write a file, and make the folder if needed; a reader sees the old file or the new one."""

    @abc.abstractmethod
    def new_file(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Provide a local path for a new file, which comes into place when the context ends.

        The folder is made then, too, if needed. If the context fails, nothing changes. A reader sees the old file or
        the new one.
        """

    @abc.abstractmethod
    def has(self, name: str) -> bool:
        """Return whether there is a file or a folder of this name."""

    @abc.abstractmethod
    def is_file(self, name: str) -> bool:
        """Return whether there is a file of this name."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Return the names in the folder; an empty list if there is no such folder."""

    @abc.abstractmethod
    def new_folder(self, name: str) -> Path:
        """Make a new local folder, to be written and then put in place by `publish`, or to be deleted."""

    @abc.abstractmethod
    def publish(self, folder: Path, name: str, last: str) -> None:
        """Put a folder from `new_folder` in place, under a free name, and bring it to the disk; ``last`` comes last.

        If that fails, everything in place that can be deleted is deleted.
        """

    @abc.abstractmethod
    def delete(self, name: str, first: str = "") -> None:
        """Delete a file or folder; of a folder, delete ``first`` before the rest. Does nothing if it does not exist."""

    @abc.abstractmethod
    def fetched(self, pattern: str) -> contextlib.AbstractContextManager[Path]:
        """Provide the folder locally; see `local_copy`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"


class LocalStorage(Storage):
    """A local folder; see `Storage`."""

    def read(self, name: str) -> bytes:
        return self._at(name).read_bytes()

    def replace(self, name: str, content: bytes) -> None:
        with self.new_file(name) as file:
            file.write_bytes(content)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        Path(self.place).mkdir(parents=True, exist_ok=True)
        temporary = self._aside(name)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(self._at(name))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(Path(self.place))

    def has(self, name: str) -> bool:
        return self._at(name).exists()

    def is_file(self, name: str) -> bool:
        return self._at(name).is_file()

    def names(self) -> list[str]:
        return [path.name for path in Path(self.place).iterdir()] if Path(self.place).is_dir() else []

    def new_folder(self, name: str) -> Path:
        folder = self._aside(name).absolute()
        folder.mkdir(parents=True)
        return folder

    def publish(self, folder: Path, name: str, last: str) -> None:
        _sync(folder)
        folder.rename(self._at(name))
        _sync(Path(self.place))

    def delete(self, name: str, first: str = "") -> None:
        path = self._at(name)
        if ASIDE not in name:  # renamed first, so that no reader takes a half-deleted folder for a whole one
            aside = self._aside(name)
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
            path = aside
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def fetched(self, pattern: str) -> contextlib.AbstractContextManager[Path]:
        return contextlib.nullcontext(Path(self.place))

    def _at(self, name: str) -> Path:
        return Path(self.place, name)

    def _aside(self, name: str) -> Path:
        return self._at(f"{name}{ASIDE}{secrets.token_hex(4)}")


class RemoteStorage(Storage):
    """A folder that fsspec reaches; see `Storage`. Local copies are made in the folder for temporary files.

    Raises:
        ValueError: If fsspec does not support the URL.
        ImportError: If fsspec needs a package that is not installed.
    """

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self._files, self._root = fsspec.core.url_to_fs(place)

    def read(self, name: str) -> bytes:
        return self._files.cat_file(self._at(name))  # type: ignore[no-any-return]  # fsspec is not annotated

    def replace(self, name: str, content: bytes) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        self._files.pipe_file(self._at(name), content)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="paramserver-") as folder:
            yield Path(folder, name)
            self._upload(Path(folder, name), name)

    def has(self, name: str) -> bool:
        self._files.invalidate_cache()  # another task may have written it
        return self._files.exists(self._at(name))  # type: ignore[no-any-return]  # as above

    def is_file(self, name: str) -> bool:
        self._files.invalidate_cache()
        return self._files.isfile(self._at(name))  # type: ignore[no-any-return]  # as above

    def names(self) -> list[str]:
        self._files.invalidate_cache()
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def new_folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}{ASIDE}"))

    def publish(self, folder: Path, name: str, last: str) -> None:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        try:
            for file in sorted(files, key=lambda file: file == last):
                self._upload(folder / file, f"{name}/{file}")
        except BaseException:
            with contextlib.suppress(OSError):  # the first error counts, and without ``last`` nothing is whole
                self.delete(name, last)
            raise
        shutil.rmtree(folder)

    def delete(self, name: str, first: str = "") -> None:
        for path in (f"{self._at(name)}/{first}", self._at(name)) if first else (self._at(name),):
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(path, recursive=True)

    @contextlib.contextmanager
    def fetched(self, pattern: str) -> Iterator[Path]:
        self._files.invalidate_cache()
        found = self._files.glob(f"{glob.escape(self._root)}/{pattern}", detail=True)
        with tempfile.TemporaryDirectory(prefix="paramserver-") as folder:
            for path in (path for path, info in found.items() if info["type"] == "file"):
                target = Path(folder, path.removeprefix(self._root).lstrip("/"))
                target.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(path, str(target))
            yield Path(folder)

    def _upload(self, file: Path, name: str) -> None:
        path = self._at(name)
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(file), path)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def _sync(path: Path) -> None:
    """Make the content of a file, or the changes in a folder, survive a power failure."""
    if sys.platform == "win32":  # which opens no folders, and flushes only files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
