"""Early stopping over real processes: every task ends, and training can go on (Y02, Y04, Y05, V31, Z19)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm

pytestmark = [pytest.mark.multiprocess]

STOPPING = """
threshold, max_steps = float(sys.argv[1]), int(sys.argv[2])
config = ps.estimator.RunConfig(
    model_dir="run", train_distribute=ps.ParameterServerStrategy(),
    save_checkpoints_steps=50, log_step_count_steps=None)
estimator = ps.estimator.Estimator(model_fn, config=config)
hook = ps.estimator.stop_if_lower_hook(
    estimator, "loss", threshold, min_steps=1, run_every_secs=None, run_every_steps=20)
best = ps.estimator.BestExporter("best", lambda: torch.ones(2, 3))
ps.estimator.train_and_evaluate(
    estimator,
    ps.estimator.TrainSpec(train_input, max_steps=max_steps, hooks=[hook]),
    ps.estimator.EvalSpec(
        eval_input, start_delay_secs=0, throttle_secs=0, exporters=[best, ps.estimator.FinalExporter("final")]))
"""


def launch(warm: Warm, script: Path, *arguments: float, evaluator: bool) -> str:
    """What a cluster of a chief, a worker and a ps says."""
    tasks = ("--ps", "1", "--workers", "2", *(["--evaluator"] if evaluator else []))
    done = warm.launch(*tasks, script.name, *map(str, arguments), cwd=script.parent)
    assert done.returncode == 0, done.stderr
    return done.stderr


def last_step(folder: Path) -> int:
    state = json.loads((folder / "run" / "checkpoint").read_text())
    assert state["finished"] is True
    return int(state["latest"].partition("-")[2])


def test_y02_y05_v31_z19_an_early_stop_ends_every_task_and_training_can_go_on(
    tmp_path: Path, script: Callable[..., Path], warm: Warm
) -> None:
    program = script(STOPPING)
    said = launch(warm, program, 1e9, 10**9, evaluator=True)  # any evaluation is below the threshold
    reached = last_step(tmp_path)
    assert 1 <= reached < 10**9
    assert " INFO training is stopped early" in said
    assert " INFO worker:0 stops early, as the chief has decided" in said
    assert f" INFO evaluated step {reached}" in said
    assert list((tmp_path / "run" / "export" / "final").glob("*/model.safetensors"))
    assert list((tmp_path / "run" / "export" / "best").glob("*/model.pt2"))

    said = launch(warm, program, -1.0, reached + 100, evaluator=False)
    assert "stops early" not in said
    assert last_step(tmp_path) >= reached + 100
