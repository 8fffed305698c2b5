"""``paramserver launch`` on a terminal of 80 columns: lines of the tasks, and below them a display that goes away."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm
from tests.patience import patience

pytestmark = [pytest.mark.multiprocess]

FAILED = """chief:0 | no
chief:0 exited with code 1; stopping the run
ps:0 | WARNING ps:0 leaves at step 0, before the run is over (SIGTERM)
error: chief:0 exited with code 1; the run was stopped
"""

EXAMPLES = Path(__file__).parents[3] / "examples"
LAUNCH = (sys.executable, "-m", "paramserver", "launch")
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def without_times(text: str) -> str:
    """The lines of a run without the times of its log, and without the line of a ps that begins to serve, if it did."""
    lines = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", text).splitlines(keepends=True)
    return "".join(line for line in lines if " INFO ps:0 serves at " not in line)


class Terminal:
    """A run of a command on a pseudo terminal, and what it has shown."""

    def __init__(self, warm: Warm, *command: str, **env: str) -> None:
        self._ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        left = {name: text for name, text in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        with warm.launcher({**left, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **env}) as options:
            self.process = subprocess.Popen(command, **streams, start_new_session=True, **options)
        os.close(theirs)
        self._seen = b""

    @property
    def seen(self) -> str:
        """What was shown, with line ends as the command wrote them."""
        return self._seen.decode().replace("\r\n", "\n")

    @property
    def frames(self) -> list[list[str]]:
        """The lines of each drawing of the display."""
        return [SEQUENCE.sub("", frame).splitlines() for frame in re.findall(r"(?m)^global step \d[^\r]*", self.seen)]

    def read_until(self, text: str) -> None:
        while text not in self.seen:
            assert self._read(), self.seen

    def read_to_the_end(self) -> int:
        """Until nobody holds the terminal any more; the exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=patience(10))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def _read(self) -> bool:
        data = b""
        with contextlib.suppress(OSError):  # Linux's way of saying that the other side is closed
            data = os.read(self._ours, 65536)
        self._seen += data
        return bool(data)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    """Those that a test has opened."""
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "train.py"


def test_a_loop_of_ones_own_has_a_display_below_its_lines(
    terminals: list[Terminal], warm: Warm, tmp_path: Path
) -> None:
    script = str(EXAMPLES / "own_loop.py")
    terminal = Terminal(warm, *LAUNCH, "--ps", "2", "--workers", "2", script, "--model-dir", str(tmp_path / "run"))
    terminals.append(terminal)
    assert terminal.read_to_the_end() == 0
    assert len(set(re.findall(r"(?:chief|worker):0 \| \S*epoch \d+", COLOUR.sub("", terminal.seen)))) == 20
    assert max(len(line) for frame in terminal.frames for line in frame) <= 80
    last = "\n".join(terminal.frames[-1])
    assert "global step 940" in last
    assert re.search(r"^chief:0 +ended *$", last, re.MULTILINE)
    assert re.search(r"^ps:1 +(done|ended) +940 +\d+\.\d\d \(max \d+\) *$", last, re.MULTILINE)
    assert terminal.seen.count(HIDE_CURSOR) == 1
    before, _, after = terminal.seen.rpartition(SHOW_CURSOR)
    assert "global step" in before
    assert not SEQUENCE.sub("", after).strip()


def test_an_estimator_tells_how_far_it_is(terminals: list[Terminal], warm: Warm, tmp_path: Path) -> None:
    options = ("--model-dir", str(tmp_path), "--max-steps", "1000")
    terminal = Terminal(warm, *LAUNCH, "--workers", "2", "--evaluator", str(EXAMPLES / "estimator.py"), *options)
    terminals.append(terminal)
    assert terminal.read_to_the_end() == 0
    last = "\n".join(terminal.frames[-1])
    assert re.match(r"global step 1,00\d of 1,000  [\d,]+ steps/s  ━+", last)
    assert re.search(r"^chief:0 +ended +\d\.\d{4} *$", last, re.MULTILINE)
    assert max(len(line) for frame in terminal.frames for line in frame) <= 80
    assert re.search(r"evaluator:0 +waiting for a checkpoint", terminal.seen)


def test_ctrl_c_gives_the_terminal_back(terminals: list[Terminal], warm: Warm, script: Path) -> None:
    script.write_text("import signal\nprint('it runs')\nsignal.pause()\n")
    terminal = Terminal(warm, *LAUNCH, str(script))
    terminals.append(terminal)
    terminal.read_until("it runs")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.read_to_the_end() == 128 + signal.SIGINT
    lines = SEQUENCE.sub("", terminal.seen).splitlines()
    assert "stopping the run (SIGINT); once more kills it" in lines
    assert "Traceback" not in terminal.seen
    assert terminal.seen.rindex(SHOW_CURSOR) > terminal.seen.rindex("global step")


def test_a_failure_is_the_last_thing_to_be_seen(terminals: list[Terminal], warm: Warm, script: Path) -> None:
    script.write_text("raise KeyError('x' * 200)\n")
    terminal = Terminal(warm, *LAUNCH, str(script))
    terminals.append(terminal)
    assert terminal.read_to_the_end() == 1
    lines = SEQUENCE.sub("", terminal.seen).splitlines()
    assert f"chief:0 | KeyError: '{'x' * 200}'" in lines
    assert "error: chief:0 exited with code 1; the run was stopped" in lines
    assert re.search(r"chief:0 +exited with code 1", "\n".join(terminal.frames[-1]))
    assert terminal.seen.rindex(SHOW_CURSOR) > terminal.seen.rindex("global step")


def test_no_colours_where_none_are_wanted(terminals: list[Terminal], warm: Warm, script: Path) -> None:
    script.write_text("raise SystemExit('no')\n")
    terminal = Terminal(warm, *LAUNCH, str(script), NO_COLOR="1")
    terminals.append(terminal)
    assert terminal.read_to_the_end() == 1
    assert "chief:0 | no\n" in terminal.seen
    assert "global step" in terminal.seen
    codes = {code for sequence in COLOUR.findall(terminal.seen) for code in sequence[2:-1].split(";")}
    assert codes <= {"0", "1", "2", ""}  # bold, dim and their end


def test_plain_lines_on_a_terminal_that_cannot_be_drawn_on(terminals: list[Terminal], warm: Warm, script: Path) -> None:
    script.write_text("raise SystemExit('no')\n")
    terminal = Terminal(warm, *LAUNCH, str(script), TERM="dumb")
    terminals.append(terminal)
    assert terminal.read_to_the_end() == 1
    assert without_times(terminal.seen) == FAILED


def test_plain_lines_where_there_is_no_terminal(script: Path, warm: Warm) -> None:
    script.write_text("print('hello')\nraise SystemExit('no')\n")
    env = {**os.environ, "FORCE_COLOR": "", "TERM": "xterm"}
    done = warm.launch(script, env=env)
    assert (done.returncode, done.stdout) == (1, "chief:0 | hello\n")
    assert without_times(done.stderr) == FAILED
