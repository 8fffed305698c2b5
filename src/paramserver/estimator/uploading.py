"""Summaries of a run whose model_dir is a URL: TensorBoard's event files, written locally and uploaded.

TensorBoard's own writer appends each record to a file. Few storages that fsspec reaches can append, and those need a
request for each record. Here the whole file is uploaded every two minutes and at the end; TensorBoard reads it there.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from paramserver.checkpoint.storage import is_remote, join, storage_of
from paramserver.summary import SummaryWriter

if TYPE_CHECKING:
    from torch.utils import tensorboard

UPLOAD_INTERVAL = 120.0
"""Seconds between two uploads. TensorBoard's writer holds points back for the same time."""


def summary_writer(place: str) -> SummaryWriter:
    """Return a writer of TensorBoard summaries for a place, a path or URL.

    Raises:
        ConfigError: If fsspec does not know the URL.
    """
    return UploadingWriter(place) if is_remote(place) else SummaryWriter(join(place))


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

    def _open(self) -> tensorboard.SummaryWriter:
        if not self._closed and self._clock() >= self._upload_at:
            self.flush()
        return super()._open()

    def _upload(self) -> None:
        for file in Path(self.log_dir).iterdir():
            with self._storage.new_file(file.name) as copy:  # a copy, because the file may grow during the upload
                shutil.copyfile(file, copy)
        self._upload_at = self._clock() + UPLOAD_INTERVAL
