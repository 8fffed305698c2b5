"""The examples run as they are, alone and as a cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "own_loop.py"
NOISE = re.compile("Traceback|Warning|ERROR|Exception")
ACCURACY = re.compile(r"(\S+ \| )?test accuracy (\d\.\d+)")


def run(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not NOISE.search(done.stderr), done.stderr
    return done.stdout.splitlines()


def accuracies(lines: list[str]) -> dict[str, float]:
    found = [match for line in lines if (match := ACCURACY.fullmatch(line))]
    return {(match[1] or "").removesuffix(" | "): float(match[2]) for match in found}


def test_own_loop_is_short() -> None:
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) < 60


@pytest.mark.multiprocess
def test_own_loop_alone() -> None:
    lines = run(sys.executable, str(EXAMPLE))
    assert lines[-2].endswith("global step 470")
    assert accuracies(lines)[""] > 0.85


@pytest.mark.multiprocess
def test_two_replicas_on_logical_devices() -> None:
    lines = run(sys.executable, str(EXAMPLES / "replicas.py"))
    assert lines[-2].endswith("global step 470, 15000 images seen")
    assert accuracies(lines)[""] > 0.85


@pytest.mark.multiprocess
@pytest.mark.parametrize("lane", ["", "auto", "tcp"])
def test_tables_learn_from_rows_alone(lane: str) -> None:
    launch = ("-m", "paramserver", "launch", "--ps", "2", "--workers", "2", "--lane", lane) if lane else ()
    lines = run(sys.executable, *launch, str(EXAMPLES / "tables.py"))
    found = (re.search(r"test error (0\.\d+), of noise alone 0.250", line) for line in lines)
    errors = [float(each[1]) for each in found if each]
    assert len(errors) == (2 if lane else 1)
    assert max(errors) < 0.4


@pytest.mark.multiprocess
def test_wide_and_deep_comes_near_to_the_best_that_can_be_done(tmp_path: Path) -> None:
    last = run(sys.executable, str(EXAMPLES / "wide_and_deep.py"), "--model-dir", str(tmp_path), "--epochs", "5")[-1]
    found = re.fullmatch(r"test accuracy (0\.\d+); who knows the odds has (0\.\d+)", last)
    assert found
    assert float(found[1]) > float(found[2]) - 0.01


@pytest.mark.multiprocess
def test_recovery_alone(tmp_path: Path) -> None:
    """And see test_recovery.py."""
    lines = run(sys.executable, str(EXAMPLES / "recovery.py"), "--model-dir", str(tmp_path), "--max-steps", "500")
    assert accuracies(lines)[""] > 0.85


@pytest.mark.multiprocess
def test_early_stopping_ends_early_and_exports_the_best(tmp_path: Path) -> None:
    options = ("--model-dir", str(tmp_path), "--patience", "400")
    last = run(sys.executable, str(EXAMPLES / "early_stopping.py"), *options)[-1]
    found = re.fullmatch(r"test accuracy (0\.\d+) at step (\d+)", last)
    assert found
    assert float(found[1]) > 0.9
    assert int(found[2]) < 20_000
    (exported,) = (tmp_path / "export" / "best").iterdir()
    assert {path.name for path in exported.iterdir()} == {"model.pt2", "model.safetensors", "signature.json"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_own_loop_as_a_cluster(lane: str) -> None:
    launch = (sys.executable, "-m", "paramserver", "launch", "--ps", "2", "--workers", "2", "--lane", lane)
    lines = run(*launch, str(EXAMPLE))
    found = accuracies(lines)
    assert found.keys() == {"chief:0", "worker:0"}
    assert min(found.values()) > 0.85
    assert any(line.endswith("global step 940") for line in lines), "each of two workers makes 470 steps"
