"""``paramserver demo`` as a user has it: five processes, a summary, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import patience

pytestmark = [pytest.mark.multiprocess, pytest.mark.whole_program]

DEMO = (sys.executable, "-m", "paramserver", "demo")
SHOW_CURSOR = b"\x1b[?25h"


def test_the_demo_trains_and_says_what_came_of_it(tmp_path, mark):
    folder = tmp_path / "a folder with quite a long name" / "and another one in it" / "run"
    command = [*DEMO, "--steps", "2000", "--model-dir", str(folder)]
    done = subprocess.run(command, env=mark, capture_output=True, text=True, timeout=patience(150), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    results = dict(re.findall(r"^(\S+(?: \S+)*)  +(\S.*)$", done.stdout, re.MULTILINE))
    assert float(results["test accuracy"]) >= 0.95
    assert float(results["global steps/s"].replace(",", "")) > 0
    updates = dict(re.findall(r"(ps:\d) (\d+)", results["updates applied"]))
    assert all(int(updates[task]) >= 2000 for task in ("ps:0", "ps:1"))
    assert re.fullmatch(r"mean \d+\.\d\d, largest \d+", results["staleness"])
    assert Path(results["last checkpoint"], "model.safetensors.index.json").is_file()
    assert list(Path(results["TensorBoard files"]).glob("events.out.tfevents.*"))
    assert Path(results["exported model"], "model.safetensors").is_file()
    assert "Evaluations on the test images\n" in done.stdout
    assert re.search(r"│ +20\d\d │ +0\.9\d\d │", done.stdout)


def test_ctrl_c_ends_everything_and_gives_the_terminal_back(tmp_path, mark, warm):
    ours, theirs = os.openpty()
    command = [*DEMO, "--steps", "1000000000", "--model-dir", str(tmp_path / "run")]
    with warm.launcher(mark) as options:
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, **options
        )
    os.close(theirs)
    try:
        screen = _until(ours, b"training")
        process.send_signal(signal.SIGINT)
        screen += _until(ours, None)
        assert process.wait(timeout=patience(10)) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    end = screen[screen.rindex(SHOW_CURSOR) :]
    assert b"stopping the run (SIGINT)" in end
    assert b"Traceback" not in screen


def _until(terminal: int, text: bytes | None) -> bytes:
    """What is shown until a text appears, or, without one, until nobody holds the terminal any more."""
    seen = b""
    while text is None or text not in seen:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux's way of saying that the other side is closed
            data = b""
        if not data:
            assert text is None, seen.decode()
            break
        seen += data
    return seen
