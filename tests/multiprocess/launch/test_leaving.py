"""A loop of one's own that handles SIGTERM itself saves what it has, and goes on from there in its next run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm
from tests.patience import patience

from paramserver import ParameterServerStrategy
from paramserver.errors import UnavailableError
from paramserver.testing import LocalCluster

pytestmark = pytest.mark.multiprocess

EXAMPLE = Path(__file__).parents[3] / "examples" / "leaving.py"
PATIENCE = patience(60.0)


def leave(number: signal.Signals, model_dir: Path, warm: Warm, mark: dict[str, str]) -> tuple[int, str]:
    """Run the example until both workers train, and send a signal to the launcher; its exit code and output."""
    command = [sys.executable, "-m", "paramserver", "launch", "--ps", "2", "--workers", "2"]
    command += [str(EXAMPLE), "--model-dir", str(model_dir)]
    with (
        warm.launcher(mark) as how,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how) as launcher,
    ):
        assert launcher.stdout is not None
        said, waiting = "", {"chief:0", "worker:0"}
        for line in launcher.stdout:
            said += line
            if "begins at step" in line:
                waiting.discard(line.partition(" | ")[0])
            if not waiting:
                break
        launcher.send_signal(number)
        said += launcher.communicate(timeout=PATIENCE)[0]
    return launcher.returncode, said


def test_a_loop_that_is_asked_to_leave_saves_and_goes_on_in_the_next_run(
    tmp_path: Path, warm: Warm, mark: dict[str, str]
) -> None:
    code, said = leave(signal.SIGTERM, tmp_path, warm, mark)
    assert code == 143, said
    assert "Traceback" not in said
    assert "killing it" not in said
    (step,) = re.findall(r"chief:0 \| .*saved a checkpoint of step (\d+)", said)
    assert int(step) > 0
    code, said = leave(signal.SIGINT, tmp_path, warm, mark)
    assert code == 130, said
    assert f"chief:0 | begins at step {step}\n" in said


def test_a_chief_that_was_started_by_hand_leaves_as_a_lost_one(tmp_path: Path) -> None:
    """Without a launcher, nothing but the program itself tells its end from that of the training."""
    with LocalCluster(ps=1, grace=0) as cluster:
        environment = cluster.environment("chief:0")
        command = [sys.executable, str(EXAMPLE), "--model-dir", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **environment}, text=True) as chief:
            assert chief.stdout is not None
            assert chief.stdout.readline() == "begins at step 0\n"
            chief.terminate()
            assert chief.wait(PATIENCE) == 143
        with pytest.raises(UnavailableError, match="chief:0 was lost and did not come back"):
            cluster.servers[0].join()
    assert ParameterServerStrategy.latest_checkpoint(tmp_path)
