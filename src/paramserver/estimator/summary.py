"""Writes TensorBoard event files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils import tensorboard


class SummaryWriter:
    """Adds points to the curves that TensorBoard shows for one folder.

    The file and its writing thread are made by the first point, so a writer that is never used leaves no
    file behind, and a task that writes no summaries never pays for importing tensorboard. Not thread-safe.

    Args:
        log_dir: The folder; it is made when needed.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self._writer: tensorboard.SummaryWriter | None = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "unused" if self._writer is None else "open"
        return f"SummaryWriter({self.log_dir!r}, {state})"

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point to the curve ``tag``. It is written in the background, `flush` waits for that.

        Raises:
            RuntimeError: If the writer is closed.
            OSError: If the file cannot be made.
        """
        self._open().add_scalar(tag, float(value), global_step=step)

    def flush(self) -> None:
        """Block until all points are in the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush, close the file and end the thread. Idempotent."""
        self._closed = True
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> tensorboard.SummaryWriter:
        if self._closed:
            raise RuntimeError(f"a summary was written to {self.log_dir} after its writer was closed")
        if self._writer is None:
            # Imported here because it takes a second that most tasks need not spend.
            from torch.utils.tensorboard import SummaryWriter as EventWriter

            self._writer = EventWriter(self.log_dir)
        return self._writer
