"""Every process of a run is killed once and started again, and the run ends as if nothing had been (N04).

What is killed when is up to examples/recovery.py; a step of it is a global step. The lines of a run come in the order
in which a task has printed them; those of two tasks may change places.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.patience import patience

import paramserver as ps
from paramserver.estimator.checkpoint import read_values

pytestmark = [pytest.mark.multiprocess, pytest.mark.whole_program]

EXAMPLE = Path(__file__).parents[3] / "examples" / "recovery.py"
SEED = 7
"""A worker and the evaluator are killed before the first checkpoint, the ps tasks and the chief later."""
PATIENCE = patience(170.0)
MAX_STEPS, CHECKPOINT_INTERVAL = 3000, 100
TRAINING = ["chief:0", "worker:0", "worker:1"]
TASKS = ["ps:0", "ps:1", *TRAINING, "evaluator:0"]

WHEN = re.compile(r"(?<=\| )\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ ")
STARTED_AGAIN = re.compile(r"(\S+) was killed by SIGKILL \(code 137\); it is started again in 0.5 s \(1 of 2\)")
SAVED = re.compile(r"chief:0 \| saved a checkpoint of step (\d+) to \S+")
RESTORES = re.compile(r"chief:0 \| chief:0 restores \S+/ckpt-(\d+)")
TRAINED = re.compile(r"(\S+) \| loss = \S+, step = (\d+)( \(\S+ sec\))?")
CAME_LATE = re.compile(
    r"(\S+) \| (.*came after the end|.*the run is over|training is skipped|training made no steps).*"
)
EVALUATED = re.compile(r"evaluator:0 \| evaluated step (\d+): accuracy = (\S+), loss = \S+")


def run(model_dir: Path, seed: int, env: dict[str, str]) -> list[str]:
    options = ["--kill-all", str(seed), "--model-dir", model_dir, "--max-steps", str(MAX_STEPS)]
    command, pipe = [sys.executable, EXAMPLE, *options], subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, process_group=0) as process:
        try:
            said, complaints = process.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher, too, which takes its tasks with it
            raise
    assert (process.returncode, complaints) == (0, ""), said + complaints
    assert "Traceback" not in said
    return [WHEN.sub("", line) for line in said.splitlines()]


def found(pattern: re.Pattern[str], lines: list[str]) -> list[re.Match[str]]:
    return [match for line in lines if (match := pattern.fullmatch(line))]


def check_killed_once(lines: list[str]) -> None:
    """And nobody has failed for any other reason."""
    assert Counter(match[1] for match in found(STARTED_AGAIN, lines)) == Counter(TASKS)
    assert sum("it is started again" in line for line in lines) == len(TASKS)


def check_restores(lines: list[str]) -> None:
    """It is the newest checkpoint that is restored, and the chief has made less than an interval of steps since.

    Others may have made more while there was no chief. A chief that was killed may have written one checkpoint that it
    could not tell of.
    """
    newest, reached, was_killed = 0, 0, False
    for line in lines:
        if line.startswith("chief:0 was killed"):
            was_killed = True
        elif match := SAVED.fullmatch(line):
            newest = int(match[1])
        elif (match := TRAINED.fullmatch(line)) and match[1] == "chief:0":
            reached = int(match[2])
        elif match := RESTORES.fullmatch(line):
            restored = int(match[1])
            assert restored == newest or (was_killed and restored > newest), line
            assert reached - restored < CHECKPOINT_INTERVAL, line
            newest = restored
    assert found(RESTORES, lines), "a ps was lost, and with it what it held"


def check_all_trained_on(lines: list[str]) -> None:
    """Whoever was killed trains again, or learns that the training is over; the others go on to its end."""
    for task in TRAINING:
        start = next(index for index, line in enumerate(lines) if line.startswith(f"{task} was killed"))
        came_late = any(match[1] == task for match in found(CAME_LATE, lines[start:]))
        steps = [int(match[2]) for match in found(TRAINED, lines[start:]) if match[1] == task]
        assert came_late or steps[-1] >= MAX_STEPS, task


def check_model_dir(model_dir: Path) -> None:
    """The state file names whole checkpoints, the last of them at the end."""
    state = json.loads((model_dir / "checkpoint").read_text())
    assert state["finished"] is True
    assert state["latest"] == state["retained"][-1]
    assert MAX_STEPS <= step_of(state["latest"]) < MAX_STEPS + len(TRAINING)
    steps = [step_of(name) for name in state["retained"]]
    assert steps == sorted(steps)
    names = [set(read_values(str(model_dir / name))) for name in state["retained"]]  # it refuses what is cut short
    assert all(each == names[0] for each in names)
    assert not list(model_dir.glob("*.tmp-*"))


def step_of(checkpoint: str) -> int:
    return int(checkpoint.partition("-")[2])


def check_evaluations(model_dir: Path, lines: list[str]) -> str:
    """The first checkpoint of the step to stop at is the last that is evaluated (V22); its name.

    One that is begun just before that step may hold it, and then it is not the last that is written.
    """
    said = {int(match[1]): float(match[2]) for match in found(EVALUATED, lines)}
    assert [step >= MAX_STEPS for step in said] == [False] * (len(said) - 1) + [True]
    assert said[max(said)] >= 0.95
    written = ps.estimator.read_eval_metrics(model_dir / "eval")
    assert said == {step: pytest.approx(written[step]["accuracy"], abs=1e-5) for step in said}
    return f"ckpt-{max(said)}"


def check_export(model_dir: Path, evaluated: str) -> None:
    (exported,) = (model_dir / "export" / "final").iterdir()
    torch.testing.assert_close(load_file(exported / "model.safetensors"), read_values(str(model_dir / evaluated)))


def test_n04_every_process_is_killed_once(tmp_path: Path, mark: dict[str, str]) -> None:
    """Over shared memory; tests/integration/distribute/test_recovery.py loses ps tasks on both lanes."""
    lines = run(tmp_path, SEED, mark)
    check_killed_once(lines)
    check_restores(lines)
    check_all_trained_on(lines)
    check_model_dir(tmp_path)
    check_export(tmp_path, check_evaluations(tmp_path, lines))
