"""Bytes to lines, lines to a prefixed terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.output import JsonPrinter, LineBuffer, LogFiles, OutputLine, Printer

CHIEF = TaskId(Role.CHIEF, 0)


def lines_of(*chunks: bytes) -> list[bytes]:
    buffer = LineBuffer()
    return [line for chunk in chunks for line in buffer.feed(chunk)] + buffer.finish()


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ((b"one\ntwo\n",), [b"one", b"two"]),
        ((b"on", b"e\ntw", b"o\n"), [b"one", b"two"]),
        ((b"no end",), [b"no end"]),
        ((b"\n\n",), [b"", b""]),
        ((b"dos\r\n", b"cut\r", b"\nend\n"), [b"dos", b"cut", b"end"]),
        ((b"\r10%", b"\r20%", b"\r30%\n"), [b"10%", b"20%", b"30%"]),
        ((), []),
    ],
)
def test_lines(chunks: tuple[bytes, ...], lines: list[bytes]) -> None:
    assert lines_of(*chunks) == lines


def test_a_progress_bar_is_seen_before_its_line_ends() -> None:
    buffer = LineBuffer()
    assert buffer.feed(b"\r10%") == []
    assert buffer.feed(b"\r20%") == [b"10%"]


def test_a_line_without_an_end_does_not_fill_the_memory() -> None:
    data = b"x" * (LineBuffer.LIMIT_BYTES + 1)
    assert LineBuffer().feed(data) == [data]


def test_lines_are_marked_and_errors_go_to_stderr() -> None:
    out, err = io.StringIO(), io.StringIO()
    printer = Printer([CHIEF], out, err)
    printer(OutputLine(CHIEF, "fine", is_error=False))
    printer(OutputLine(CHIEF, "odd", is_error=True))
    printer(OutputLine(None, "the launcher's own", is_error=True))
    assert out.getvalue() == "chief:0 | fine\n"
    assert err.getvalue() == "chief:0 | odd\nthe launcher's own\n"


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        return True


def test_only_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    Printer([CHIEF], out, io.StringIO())(OutputLine(CHIEF, "[red] fine", is_error=False))
    assert out.getvalue() == "\x1b[36mchief:0 | \x1b[0m[red] fine\n"


def test_who_wants_no_colours_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    Printer([CHIEF], out, io.StringIO())(OutputLine(CHIEF, "fine", is_error=False))
    assert out.getvalue() == "chief:0 | fine\n"


def test_a_character_that_the_terminal_lacks_is_replaced() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as out:
        Printer([CHIEF], out, io.StringIO())(OutputLine(CHIEF, "café", is_error=False))
        assert raw.getvalue() == b"chief:0 | caf?\n"


def test_lines_in_json_are_objects_and_a_tasks_own_objects_stay() -> None:
    out = io.StringIO()
    printer = JsonPrinter(out)
    own = '{"time":"2026-01-01T08:00:00.000+00:00","level":"info","task":"chief:0","message":"saved"}'
    for line in (OutputLine(CHIEF, own, True), OutputLine(CHIEF, "fine", False), OutputLine(None, "stopping", True)):
        printer(line)
    first, *others = out.getvalue().splitlines()
    assert first == own
    assert [{**json.loads(other), "time": ""} for other in others] == [
        {"time": "", "task": "chief:0", "message": "fine", "stream": "stdout"},
        {"time": "", "level": "info", "task": "launcher", "message": "stopping"},
    ]


def test_each_task_has_a_file_of_its_own(tmp_path: Path) -> None:
    files = LogFiles(tmp_path / "logs")
    files(OutputLine(CHIEF, "fine", is_error=False))
    files(OutputLine(CHIEF, "odd", is_error=True))
    files(OutputLine(None, "stopping", is_error=True))
    files.close()
    written = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert written == {"chief-0.log": "fine\nodd\n", "launcher.log": "stopping\n"}


def test_a_folder_for_logs_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--log-dir: .*file/logs cannot be written: Not a directory"):
        LogFiles(tmp_path / "file" / "logs")
