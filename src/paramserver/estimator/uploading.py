"""Summaries of a run whose model_dir is a URL: TensorBoard's event files, written locally and uploaded.

TensorBoard's own writer appends each record to a file. Few storages that fsspec reaches can append, and those need a
request for each record. Here the whole file is uploaded every two minutes and at the end; TensorBoard reads it there.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from paramserver.checkpoint.storage import is_remote, join, storage_of
from paramserver.errors import ParameterServerError
from paramserver.summary import SummaryWriter

logger = logging.getLogger(__name__)

UPLOAD_INTERVAL = 120.0
"""Seconds between two uploads. TensorBoard's writer holds points back for the same time."""


def summary_writer(place: str) -> SummaryWriter:
    """Return a writer of TensorBoard summaries for a place, a path or URL.

    Raises:
        ConfigError: If fsspec does not know the URL.
    """
    return UploadingWriter(place) if is_remote(place) else SummaryWriter(join(place))


@contextlib.contextmanager
def going_on_without(what: str) -> Iterator[list[OSError]]:
    """Make an error of the storage a line in the log: a run is worth more than its summaries.

    Args:
        what: What cannot be written then, for the log.

    Yields:
        The error, once it has happened.
    """
    failed: list[OSError] = []
    try:
        yield failed
    except ParameterServerError:  # a lost connection is an OSError, too
        raise
    except OSError as error:
        failed.append(error)
        # As text: a kept record must not keep the tensors in the frames of the error's traceback.
        logger.error("%s cannot be written, and the run goes on without them: %s", what, str(error))


@contextlib.contextmanager
def training_writer(model_dir: str) -> Iterator[SummaryWriter]:
    """Provide a `summary_writer` whose failure at the end does not end the run."""
    writer = summary_writer(model_dir)
    try:
        yield writer
    finally:
        with going_on_without(f"the last summaries in {model_dir}"):
            writer.close()


class UploadingWriter(SummaryWriter):
    """A `SummaryWriter` for a URL. Points are uploaded by `flush`, `close`, or the next point after two minutes.

    Every method that adds a point may block for an upload, and raises OSError if that fails. Until the writer is
    closed, the event file is also in the folder for temporary files. Not thread-safe.

    Args:
        place: The URL.
        clock: Returns the present time in seconds.

    Raises:
        ConfigError: If fsspec does not know the URL.
    """

    def __init__(self, place: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage_of(place)
        self._folder = tempfile.TemporaryDirectory(prefix="paramserver-")
        super().__init__(self._folder.name)
        self._clock = clock
        self._upload_at = clock() + UPLOAD_INTERVAL

    def __repr__(self) -> str:
        return super().__repr__().replace(self.log_dir, self._storage.place)

    def flush(self) -> None:
        """Upload all points. Blocks; raises OSError if the upload fails."""
        super().flush()
        self._upload()

    def close(self) -> None:
        """Flush, close the file, end the thread and delete the local file. Idempotent; raises as `flush`."""
        if self._closed:
            return
        with self._folder:
            super().close()
            self._upload()

    def _add(self, make: Callable[[ModuleType], object], step: int) -> None:
        if not self._closed and self._clock() >= self._upload_at:
            self.flush()
        super()._add(make, step)

    def _upload(self) -> None:
        self._upload_at = self._clock() + UPLOAD_INTERVAL
        try:
            self._upload_all()
        except OSError:
            raise
        except Exception as error:  # storages that fsspec reaches raise errors of their own
            raise OSError(f"{self._storage.place}: {type(error).__name__}: {error}") from error

    def _upload_all(self) -> None:
        for file in Path(self.log_dir).iterdir():
            with self._storage.new_file(file.name) as copy:  # a copy, because the file may grow during the upload
                shutil.copyfile(file, copy)
