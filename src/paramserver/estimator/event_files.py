"""The metrics that evaluations have written for TensorBoard, read back: one dict for each step.

Rules
    * Files are merged in the order of their names, which begin with the time; of two values of one metric at one step
      the later one counts. Values are stored as float32.
    * A damaged record ends its own file only: the rest of that file is skipped, with a warning.
    * An unfinished evaluation shows the metrics written so far: its step may lack some.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paramserver.checkpoint.storage import join, local_copy

EVENT_FILES = "*.tfevents.*"

_RECORD_OVERHEAD = 16
"""Bytes around each record: its length, and the checksums of length and record."""

logger = logging.getLogger(__name__)

EvalMetrics = dict[int, dict[str, float]]
"""Metrics by global step, in the order of the steps."""


def read_eval_metrics(eval_dir: str | os.PathLike[str]) -> EvalMetrics:
    """Read the metrics of all evaluations in a folder, by global step, the steps sorted. Reads all files anew.

    Args:
        eval_dir: A folder such as ``model_dir/eval``, a path or URL. If it is missing or empty, the result is ``{}``.

    Returns:
        The metrics that were written for each step.

    Raises:
        OSError: If a URL cannot be read.

    Example:
        >>> import tempfile
        >>> from paramserver.summary import SummaryWriter
        >>> with tempfile.TemporaryDirectory() as eval_dir:
        ...     writer = SummaryWriter(eval_dir)
        ...     writer.scalar("loss", 0.5, step=20)
        ...     writer.scalar("loss", 2.0, step=10)
        ...     writer.close()
        ...     read_eval_metrics(eval_dir)
        {10: {'loss': 2.0}, 20: {'loss': 0.5}}
    """
    return read_metrics(os.fspath(eval_dir), EVENT_FILES)


def read_metrics(place: str, pattern: str) -> EvalMetrics:
    """Read the scalars of the event files at a place that match a pattern; as `read_eval_metrics`."""
    found: EvalMetrics = defaultdict(dict)
    with local_copy(place, pattern) as folder:
        for file in sorted(folder.glob(pattern)):
            for event in _events(file, join(place, str(file.relative_to(folder)))):
                scalars = {each.tag: _shortest(each.simple_value) for each in event.summary.value if _is_scalar(each)}
                if scalars:
                    found[event.step].update(scalars)
    return dict(sorted(found.items()))


def _is_scalar(value: Any) -> bool:
    return bool(value.HasField("simple_value"))


def _shortest(value: float) -> float:
    """Return the shortest decimal number that is stored as this float32, so that 0.6 is read back as 0.6."""
    return float(str(np.float32(value)))


def _events(file: Path, path: str) -> Iterator[Any]:
    """Yield the events of a file; ``path`` is its name in messages."""
    # Imported here because the import takes a second, which most tasks need not spend.
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    size, read = file.stat().st_size, 0
    for record in RawEventFileLoader(str(file)).Load():  # stops silently where the file is damaged
        read += len(record) + _RECORD_OVERHEAD
        yield Event.FromString(record)
    if read < size:
        logger.warning("%s cannot be read beyond byte %d of %d: it is cut short or damaged there", path, read, size)
