"""Summaries: points for TensorBoard, recorded where the model is called.

Rules
    * A call records only if its points are wanted: in the steps that an Estimator's `SummarySaverHook` writes, or
      inside a program's own ``with recording(writer, step):``. Everywhere else it returns at once.
    * Of all workers only the chief records, and of its replicas only the first: a step gives one point, however many
      replicas compute it.
    * The recorded value is a copy, made at the call; parameters may change before it is written.

The recording function is a context variable: replicas inherit it from the thread that runs them, and nothing is global.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch

from paramserver.distribute.core import context
from paramserver.errors import ConfigError

__all__ = ["SummaryWriter", "Writer", "histogram", "image", "recording", "scalar", "text"]

logger = logging.getLogger(__name__)

IMAGE_LAYOUTS = {2: "HW", 3: "CHW", 4: "NCHW"}
CHANNELS = {3: (1, 3, 4), 4: (1, 3)}
"""Accepted numbers of channels, by the number of axes of an image."""
HISTOGRAM_LIMIT = 1e20
"""Limit of TensorBoard's histogram buckets."""
FLUSH_INTERVAL = 120.0
"""Seconds for which points are held back, as TensorBoard's own writer does."""
FLUSH_BYTES = 1 << 20


class Writer(Protocol):
    """A destination of summaries, such as `SummaryWriter`. It receives CPU copies that never change afterwards."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add one point to a curve."""

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Add one distribution; ``values`` is flat."""

    def image(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """Add one image ``[height, width]`` or ``[channels, height, width]``, or several in one more axis."""

    def text(self, name: str, text: str, step: int) -> None:
        """Add one piece of Markdown."""

    def flush(self) -> None:
        """Make what was added visible to readers."""


class Point(NamedTuple):
    """A recorded point, to be written when its step is known."""

    name: str
    write: Callable[[Writer, int], None]


Record = Callable[[Point], object]

_record: ContextVar[Record | None] = ContextVar("paramserver.summary", default=None)


def scalar(name: str, value: float | torch.Tensor) -> None:
    """Record a number.

    Waits for the value's device if the call records, and takes less than a microsecond if it does not.

    Args:
        name: Name of the curve. The part before a ``/`` groups curves in TensorBoard.
        value: A number, or a tensor of one element.

    Raises:
        ConfigError: If the value is not a single number.

    >>> scalar("loss/regularisation", 0.25)  # no block records here, so this does nothing
    """
    if record := _wanted():
        number = _as_number(name, value)
        record(Point(name, lambda writer, step: writer.scalar(name, number, step)))


def histogram(name: str, values: torch.Tensor) -> None:
    """Record the distribution of a tensor's elements. Costs as much as `scalar`, and a copy if the call records.

    Args:
        name: Name of the distribution.
        values: A tensor of any shape and dtype; of a sparse tensor, only the stored elements count. NaN and infinity do
            not count.

    Raises:
        ConfigError: If ``values`` is not a tensor.
    """
    if record := _wanted():
        _check_tensor("histogram", name, values)
        held = values.coalesce().values() if values.is_sparse else values
        kept = held.detach().to("cpu", torch.float32, copy=True).flatten()
        record(Point(name, lambda writer, step: writer.histogram(name, kept, step)))


def image(name: str, pixels: torch.Tensor) -> None:
    """Record an image. Costs as much as `histogram`.

    Args:
        name: Name of the image.
        pixels: ``[height, width]``, ``[channels, height, width]`` with 1, 3 or 4 channels, or a batch
            ``[n, channels, height, width]`` with 1 or 3, which is shown as one image; uint8, or floats from 0 to 1.

    Raises:
        ConfigError: If ``pixels`` is not a tensor of such a shape.
    """
    if record := _wanted():
        _check_tensor("image", name, pixels)
        _check_image(name, pixels)
        kept = pixels.detach().to("cpu", copy=True)
        record(Point(name, lambda writer, step: writer.image(name, kept, step)))


def text(name: str, text: str) -> None:
    """Record a text, such as a sample of a model's output, which TensorBoard shows as Markdown. Costs as `scalar`.

    Raises:
        ConfigError: If ``text`` is not a str.
    """
    if record := _wanted():
        if not isinstance(text, str):
            raise ConfigError(f"summary.text {name!r}: expected a str, got a {type(text).__name__}")
        record(Point(name, lambda writer, step: writer.text(name, text, step)))


@contextlib.contextmanager
def recording(writer: Writer | None, step: int) -> Iterator[None]:
    """Write the points that are recorded inside the block, in a loop of your own. Closes nothing.

    Every worker may enter it: inside the strategy's scope, and inside the functions that it runs, only the chief's
    first replica records. Of nested blocks, the innermost one records.

    Args:
        writer: Receives the points at once; None records nothing, for steps without summaries.
        step: The global step of the points.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
    ...     for step in range(1, 4):
    ...         with recording(writer if step % 2 else None, step):
    ...             scalar("loss", 1 / step)
    """
    with collecting(None if writer is None else lambda point: point.write(writer, step)):
        yield


@contextlib.contextmanager
def collecting(record: Record | None) -> Iterator[None]:
    """Pass the points that are recorded inside the block to a function, which may learn their step only afterwards."""
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)


class SummaryWriter:
    """Adds points to a folder of TensorBoard.

    The first point makes the file, so a writer that is never used leaves no file behind, and a task that writes no
    summaries never imports tensorboard. Points are held back for up to two minutes; `flush` writes them at once.

    Every method that adds a point raises RuntimeError if the writer is closed. All methods raise OSError if the file
    cannot be written: the points that were held back are lost then, and the next point begins a new file. Not
    thread-safe.

    Args:
        log_dir: The folder; it is made when needed.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self._file: _EventFile | None = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "unused" if self._file is None else "open"
        return f"SummaryWriter({self.log_dir!r}, {state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add one point to a curve."""
        number = float(value)
        self._add(lambda kinds: kinds.scalar(name, number), step)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Add one distribution. Elements that TensorBoard has no bucket for, such as NaN, are left out."""
        counted = values[values.abs() < HISTOGRAM_LIMIT]
        if counted.numel():
            self._add(lambda kinds: kinds.histogram(name, counted, _buckets()), step)
        else:
            logger.warning("summary %r of step %d is not written: it has no finite element", name, step)

    def image(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """Add one image; NaN is shown as 0."""
        shown, layout = pixels.nan_to_num(), IMAGE_LAYOUTS[pixels.ndim]
        self._add(lambda kinds: kinds.image(name, shown, dataformats=layout), step)

    def text(self, name: str, text: str, step: int) -> None:
        """Add one piece of Markdown."""
        self._add(lambda kinds: kinds.text(name, text), step)

    def flush(self) -> None:
        """Write all points into the file. Blocks."""
        with self._giving_up():
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Flush and close the file. Idempotent."""
        self._closed = True
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _add(self, make: Callable[[ModuleType], object], step: int) -> None:
        with self._giving_up():
            file = self._open()
            file.add(make(file.kinds), step)

    def _open(self) -> _EventFile:
        if self._closed:
            raise RuntimeError(f"a summary was written to {self.log_dir} after its writer was closed")
        if self._file is None:
            self._file = _EventFile(self.log_dir)
        return self._file

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Close the file if it cannot be written."""
        try:
            yield
        except OSError:
            if self._file is not None:
                self._file.close()
                self._file = None
            raise


class _EventFile:
    """An event file, written by the calling thread.

    TensorBoard's own writer has a thread for that, which prints a traceback and ends with the first error of the file
    system: it would take all later points with it.

    Attributes:
        kinds: The functions that make a summary of each kind.
    """

    def __init__(self, log_dir: str) -> None:
        # Imported here because it takes a second, which most tasks need not spend.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.kinds: ModuleType = summary
        self._event = Event
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        # Readers take files in the order of their names, also those of one second and process.
        unique = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns():020d}"
        self._file = Path(log_dir, f"events.out.tfevents.{unique}").open("wb", buffering=0)  # noqa: SIM115  # see `close`
        self._unwritten = io.BytesIO()
        self._records = RecordWriter(self._unwritten)
        self._flush_at = -math.inf
        try:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        except BaseException:
            self.close()
            raise

    def add(self, summary: object, step: int) -> None:
        """Add a summary; written with the next flush, at the latest two minutes after the last one."""
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write all summaries.

        Raises:
            OSError: If the file cannot be written, or was deleted. It ends with a whole record nevertheless.
        """
        whole = self._file.tell()
        left = memoryview(self._unwritten.getvalue())
        self._unwritten.seek(0)
        self._unwritten.truncate()
        try:
            if not os.fstat(self._file.fileno()).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "the event file was deleted", str(self._file.name))
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(whole)  # readers stop at a record that is cut short
            raise
        self._flush_at = time.monotonic() + FLUSH_INTERVAL

    def close(self) -> None:
        """Close the file without a flush. Idempotent."""
        self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        if time.monotonic() >= self._flush_at or self._unwritten.tell() > FLUSH_BYTES:
            self.flush()


@functools.cache
def _buckets() -> list[float]:
    """Return the limits of TensorBoard's histogram buckets, which lie densely around 0."""
    limits, limit = list[float](), 1e-12
    while limit < HISTOGRAM_LIMIT:
        limits.append(limit)
        limit *= 1.1
    return [*(-each for each in reversed(limits)), 0.0, *limits]


def _wanted() -> Record | None:
    """Return the function that takes points; None if none are recorded here."""
    record = _record.get()
    return record if record is not None and _is_recorded_here() else None


def _is_recorded_here() -> bool:
    frame = context.current()
    if frame is None:
        return True
    return frame.strategy.is_chief and (frame.replica is None or frame.replica.index == 0)


def _as_number(name: str, value: float | torch.Tensor) -> float:
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise ConfigError(
            f"summary.scalar {name!r}: expected a single number, got a {type(value).__name__}{shape}; "
            "reduce it, for instance with mean()"
        ) from error


def _check_tensor(kind: str, name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"summary.{kind} {name!r}: expected a tensor, got a {type(value).__name__}")


def _check_image(name: str, pixels: torch.Tensor) -> None:
    is_image = pixels.ndim == 2 or (pixels.ndim in CHANNELS and pixels.shape[-3] in CHANNELS[pixels.ndim])
    if not is_image:
        raise ConfigError(
            f"summary.image {name!r}: expected [height, width], [channels, height, width] with 1, 3 or 4 channels, or "
            f"[n, channels, height, width] with 1 or 3, got {list(pixels.shape)}; move the channels with permute()"
        )
