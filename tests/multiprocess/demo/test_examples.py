"""The examples run as they are, alone and as a cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.multiprocess.warm import SCRIPT, Done, Warm
from tests.patience import patience

from paramserver.checkpoint.index import SLOTS_INDEX, read_index

EXAMPLES = Path(__file__).parents[3] / "examples"
EXAMPLE = EXAMPLES / "own_loop.py"
NOISE = re.compile("Traceback|Warning|ERROR|Exception")
ACCURACY = re.compile(r"(\S+ \| )?test accuracy (\d\.\d+)")


def alone(warm: Warm, *command: str | Path) -> list[str]:
    return lines(warm.run(SCRIPT, *command))


def cluster(warm: Warm, lane: str, example: Path, *arguments: str | Path) -> list[str]:
    return lines(warm.launch("--ps", "2", "--workers", "2", "--lane", lane, example, *arguments))


def lines(done: Done) -> list[str]:
    """What a program has said that ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert not NOISE.search(done.stderr), done.stderr
    return done.stdout.splitlines()


def accuracies(said: list[str]) -> dict[str, float]:
    found = [match for line in said if (match := ACCURACY.fullmatch(line))]
    return {(match[1] or "").removesuffix(" | "): float(match[2]) for match in found}


def test_own_loop_is_short() -> None:
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) < 60


@pytest.mark.multiprocess
@pytest.mark.whole_program
def test_own_loop_alone(tmp_path: Path, warm: Warm) -> None:
    command = [sys.executable, EXAMPLE, "--model-dir", tmp_path]
    said = lines(subprocess.run(command, capture_output=True, text=True, timeout=patience(100), check=False))
    assert said[-3].endswith("global step 470")
    assert said[-2] == f"saved {tmp_path / 'ckpt-470'}"
    assert accuracies(said)[""] > 0.85
    said = alone(warm, EXAMPLE, "--model-dir", tmp_path, "--epochs", "1")
    assert said[0].endswith("global step 517"), "the second time it goes on from where it ended"
    assert accuracies(said)[""] > 0.85


@pytest.mark.multiprocess
@pytest.mark.whole_program
def test_two_replicas_on_logical_devices(warm: Warm) -> None:
    said = alone(warm, EXAMPLES / "replicas.py")
    assert said[-2].endswith("global step 470, 15000 images seen")
    assert accuracies(said)[""] > 0.85


@pytest.mark.multiprocess
@pytest.mark.whole_program
@pytest.mark.parametrize("lane", ["", "auto", "tcp"])
def test_tables_learn_from_rows_alone(warm: Warm, lane: str) -> None:
    example = EXAMPLES / "tables.py"
    said = cluster(warm, lane, example) if lane else alone(warm, example)
    found = (re.search(r"test error (0\.\d+), of noise alone 0.250", line) for line in said)
    errors = [float(each[1]) for each in found if each]
    assert len(errors) == (2 if lane else 1)
    assert max(errors) < 0.4


@pytest.mark.multiprocess
@pytest.mark.whole_program
def test_wide_and_deep_comes_near_to_the_best_that_can_be_done(tmp_path: Path, warm: Warm) -> None:
    last = alone(warm, EXAMPLES / "wide_and_deep.py", "--model-dir", tmp_path, "--epochs", "5")[-1]
    found = re.fullmatch(r"test accuracy (0\.\d+); who knows the odds has (0\.\d+)", last)
    assert found
    assert float(found[1]) > float(found[2]) - 0.01


@pytest.mark.multiprocess
@pytest.mark.whole_program
@pytest.mark.parametrize("lane", ["", "auto", "tcp"])
def test_dlrm_with_an_optimizer_for_its_tables_comes_near_to_the_best(tmp_path: Path, warm: Warm, lane: str) -> None:
    example, options = EXAMPLES / "dlrm.py", ["--model-dir", str(tmp_path), "--max-steps", "1500"]
    if not lane:
        last = alone(warm, example, *options)[-1]
        found = re.fullmatch(r"test accuracy (0\.\d+); who knows the odds has (0\.\d+)", last)
        assert found
        assert float(found[1]) > float(found[2]) - 0.03
        return
    done = warm.launch("--ps", "2", "--workers", "2", "--evaluator", "--lane", lane, example, *options)
    lines(done)
    (step,) = re.findall(r"evaluated step (15\d\d): ", done.stderr)
    slots = {name.rpartition("/")[2] for name in read_index(tmp_path / f"ckpt-{step}" / SLOTS_INDEX)}
    assert slots == {"sum", "exp_avg", "exp_avg_sq", "step"}
    evaluations = re.findall(r"test = \[(0\.\d+), ", done.stderr)
    assert max(map(float, evaluations)) > 0.8  # the last one may follow a worker that was asleep for long


@pytest.mark.multiprocess
@pytest.mark.whole_program
def test_recovery_alone(tmp_path: Path, warm: Warm) -> None:
    """And see test_recovery.py."""
    said = alone(warm, EXAMPLES / "recovery.py", "--model-dir", tmp_path, "--max-steps", "500")
    assert accuracies(said)[""] > 0.85


@pytest.mark.multiprocess
@pytest.mark.whole_program
def test_early_stopping_ends_early_and_exports_the_best(tmp_path: Path, warm: Warm) -> None:
    last = alone(warm, EXAMPLES / "early_stopping.py", "--model-dir", tmp_path, "--patience", "400")[-1]
    found = re.fullmatch(r"test accuracy (0\.\d+) at step (\d+)", last)
    assert found
    assert float(found[1]) > 0.9
    assert int(found[2]) < 20_000
    (exported,) = (tmp_path / "export" / "best").iterdir()
    assert {path.name for path in exported.iterdir()} == {"model.pt2", "model.safetensors", "signature.json"}


@pytest.mark.multiprocess
@pytest.mark.whole_program
@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_own_loop_as_a_cluster(tmp_path: Path, warm: Warm, lane: str) -> None:
    """The chief evaluates and saves what both workers came to; then one process goes on from that (Z12)."""
    said = cluster(warm, lane, EXAMPLE, "--model-dir", tmp_path)
    found = accuracies(said)
    assert found.keys() == {"chief:0"}
    assert found["chief:0"] > 0.85
    assert f"chief:0 | saved {tmp_path / 'ckpt-940'}" in said, "each of two workers makes 470 steps"
    assert alone(warm, EXAMPLE, "--model-dir", tmp_path, "--epochs", "1")[0].endswith("global step 987")
