"""What evaluations have written for TensorBoard, read back: one dict of metrics for each step.

Rules

1. Files are merged in the order of their names, which begin with the time; of two values of one metric at one step
   the later one counts. They are stored as float32.
2. What cannot be read ends its own file only: the rest of it is passed over, with a warning.
3. An evaluation that is being written shows what is there so far: its step may lack metrics.
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
    """The metrics of all evaluations in a folder, by global step, the steps sorted. Reads all files anew.

    Args:
        eval_dir: Such as ``model_dir/eval``, a path or URL; a folder that is missing or empty gives ``{}``.

    Returns:
        For each step the metrics that were written for it.

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
    """The scalars of the event files below a place that a pattern matches, as `read_eval_metrics` gives them."""
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
    """The shortest number that is stored as this float32: an accuracy of 0.6 is not above 0.6."""
    return float(str(np.float32(value)))


def _events(file: Path, path: str) -> Iterator[Any]:
    """The events of a file, of which messages say that it lies at ``path``."""
    # Imported here because it takes a second that most tasks need not spend.
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    size, read = file.stat().st_size, 0
    for record in RawEventFileLoader(str(file)).Load():  # ends without a word where it cannot go on
        read += len(record) + _RECORD_OVERHEAD
        yield Event.FromString(record)
    if read < size:
        logger.warning("%s cannot be read beyond byte %d of %d: it is cut short or damaged there", path, read, size)
