"""The folders of exported models: their names, their completeness, and the deletion of old ones.

Rules
    * A model is a folder whose name is the time of its export, in seconds since 1970: ten digits. Folders with other
      names are left alone and never deleted. Each new name is a later time than all existing ones.
    * On a file system a folder comes into place in one move. At a URL ``model.safetensors`` is uploaded last and
      deleted first: a folder that holds it is complete.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from paramserver.checkpoint.index import WEIGHTS_FILE
from paramserver.checkpoint.storage import Storage, split, storage_of

_EXPORT = re.compile(r"\d{10}")
logger = logging.getLogger(__name__)


def new_export(export_path: str, write: Callable[[Path], object]) -> str:
    """Make the folder of a model below ``export_path``; return its path or URL. Blocks. On failure none is left.

    Args:
        export_path: A path or URL; need not exist.
        write: Fills a folder on a file system of this task, which is moved into place afterwards.

    Raises:
        OSError: If the folder cannot be made, renamed or uploaded.
    """
    storage = storage_of(export_path)
    folder = storage.new_folder(".export-model")
    try:
        write(folder)
        name = _next_name(storage)
        storage.publish(folder, name, WEIGHTS_FILE)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return storage.path(name)


def has_exports(export_path: str) -> bool:
    """Return whether a folder, a path or URL, holds an export."""
    storage = storage_of(export_path)
    return any(not storage.is_file(name) for name in _exports(storage))


def delete_old_exports(export_path: str, keep: int | None) -> None:
    """Delete all but the newest exports in a folder; an export is a folder whose name is ten digits.

    Args:
        export_path: The folder, a path or URL; need not exist.
        keep: Number of exports to keep; None keeps all.
    """
    if keep is None:
        return
    storage = storage_of(export_path)
    exports = [name for name in _exports(storage) if not storage.is_file(name)]
    for name in exports[:-keep]:
        delete_export(storage.path(name))


def delete_export(path: str | os.PathLike[str]) -> None:
    """Delete one export. Logs a warning if that fails, or the export is gone already."""
    folder, name = split(os.fspath(path))
    storage = storage_of(folder)
    try:
        if not storage.has(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        storage.delete(name, WEIGHTS_FILE)
    except OSError as error:
        logger.warning("the old export %s cannot be deleted: %s; delete it by hand", path, str(error))


def _next_name(storage: Storage) -> str:
    """Return the time, or a later one than all names: the second of two exports in one second must be the newer one."""
    there = [int(name) + 1 for name in _exports(storage)]
    return str(max([int(time.time()), *there]))


def _exports(storage: Storage) -> list[str]:
    return sorted(name for name in storage.names() if _EXPORT.fullmatch(name))
