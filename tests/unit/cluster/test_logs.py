"""The formats of a task's log."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from paramserver.cluster.logs import JsonFormatter, TextFormatter, check_level
from paramserver.errors import ConfigError


def record(message: str, *arguments: object, failed: bool = False) -> logging.LogRecord:
    error = None
    if failed:
        try:
            raise ValueError("no data")
        except ValueError:
            error = sys.exc_info()
    return logging.LogRecord("paramserver.server", logging.WARNING, "file.py", 1, message, arguments, error)


def test_a_line_of_text_has_time_level_and_task() -> None:
    line = TextFormatter("ps:0").format(record("serves at %s", "a:1"))
    date, time, *rest = line.split()
    assert (len(date), len(time)) == (10, 8)
    assert rest == ["WARNING", "ps:0:", "serves", "at", "a:1"]


def test_the_task_is_left_out_where_a_launcher_adds_it() -> None:
    assert TextFormatter("").format(record("begins")).endswith(" WARNING begins")


def test_a_line_of_json_is_one_object() -> None:
    line = json.loads(JsonFormatter("ps:0").format(record("two\nlines of %s", '"text"')))
    assert line.pop("time")[10] == "T"
    assert line == {
        "level": "warning",
        "task": "ps:0",
        "logger": "paramserver.server",
        "message": 'two\nlines of "text"',
    }


def test_a_traceback_stays_inside_of_the_object() -> None:
    text = JsonFormatter("ps:0").format(record("failed", failed=True))
    assert "\n" not in text
    assert json.loads(text)["message"].endswith("ValueError: no data")


def test_a_wrong_level_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--log-level: expected one of debug, .*, got 'warn'; did you mean 'warning'"):
        check_level("warn", "--log-level")
