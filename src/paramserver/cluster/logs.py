"""The log of a task: one format for every command, with time, level and task."""

from __future__ import annotations

import logging
import sys
from datetime import datetime

import msgspec

from paramserver.errors import ConfigError, did_you_mean

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of a log in JSON.

    Attributes:
        time: The time, ISO 8601 with the offset from UTC.
        level: One of `LEVELS`; empty for a line that a program has printed.
        task: The task, or ``launcher``.
        logger: The name of the logger.
        message: The text.
        stream: ``stdout`` or ``stderr`` for a line that a program has printed.
    """

    time: str
    level: str = ""
    task: str
    logger: str = ""
    message: str
    stream: str = ""


class TextFormatter(logging.Formatter):
    """Formats a record as ``2026-12-01 08:00:00 INFO chief:0: saved a checkpoint``.

    Args:
        task: The task; empty where another process adds it.
    """

    def __init__(self, task: str) -> None:
        name = f" {task}:" if task else ""
        super().__init__(f"%(asctime)s %(levelname)s{name} %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, a `Record`.

    Args:
        task: The task.
    """

    def __init__(self, task: str) -> None:
        super().__init__()
        self._task = task

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        line = Record(
            time=timestamp(datetime.fromtimestamp(record.created).astimezone()),
            level=record.levelname.lower(),
            task=self._task,
            logger=record.name,
            message=message,
        )
        return msgspec.json.encode(line).decode()


def timestamp(moment: datetime) -> str:
    """Return a time as in `Record`."""
    return moment.isoformat(timespec="milliseconds")


def set_up(task: str, level: str, form: str, *, names_task: bool = True) -> None:
    """Log to stderr from now on, in the format of all tasks. Does nothing if the program has set up logging itself.

    Args:
        task: The task of this process.
        level: One of `LEVELS`.
        form: One of `FORMATS`.
        names_task: Whether lines of text name the task; a launcher does that by itself.
    """
    formatter = JsonFormatter(task) if form == "json" else TextFormatter(task if names_task else "")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def check_level(level: str, where: str) -> None:
    """Check the name of a level.

    Raises:
        ConfigError: If it is not one of `LEVELS`; the message begins with ``where``.
    """
    _check(level, LEVELS, where)


def check_format(form: str, where: str) -> None:
    """Check the name of a format, as `check_level` does."""
    _check(form, FORMATS, where)


def _check(name: str, known: tuple[str, ...], where: str) -> None:
    if name not in known:
        raise ConfigError(f"{where}: expected one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")
