"""The Estimator over real processes: the example alone and as a cluster, and going on after everything was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.multiprocess.warm import SCRIPT

from paramserver.checkpoint.model_dir import latest_checkpoint
from paramserver.checkpoint.saved_values import SavedValues

pytestmark = [pytest.mark.multiprocess]

EXAMPLE = Path(__file__).parents[3] / "examples" / "estimator.py"
LAUNCH = (sys.executable, "-m", "paramserver", "launch")


def steps(model_dir: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in model_dir.glob("ckpt-*") if "tmp" not in path.name)


def state(model_dir: Path) -> dict[str, object]:
    return json.loads((model_dir / "checkpoint").read_text())


def test_the_example_runs_alone(tmp_path, warm):
    done = warm.run(SCRIPT, EXAMPLE, "--max-steps", "300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test accuracy 0.9")
    assert done.stdout.endswith("at step 300\n")
    assert (done.stderr, steps(tmp_path / "run")) == ("", [0, 300])


def test_the_example_runs_as_a_cluster(tmp_path, warm):
    options = ("--ps", "2", "--workers", "2", "--evaluator")
    done = warm.launch(*options, EXAMPLE, "--max-steps", "300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = steps(tmp_path / "run")[-1]  # W10: all workers together, and each of them may come one step late
    assert 300 <= last <= 301
    evaluated = [line for line in done.stderr.splitlines() if " evaluated step 30" in line]
    assert float(evaluated[-1].partition("accuracy = ")[2].partition(",")[0]) > 0.85
    assert list((tmp_path / "run" / "export" / "final").glob("*/model.safetensors"))
    assert state(tmp_path / "run")["finished"] is True
    assert "Traceback" not in done.stderr


def test_b05_only_the_chief_writes_into_model_dir(tmp_path, script, warm):
    path = script(
        "import json, os",
        "task = json.loads(os.environ['TF_CONFIG'])['task']",
        "main(f\"{task['type']}-{task['index']}\", 60)",
    )
    done = warm.launch("--workers", "2", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "chief-0").iterdir()} > {"checkpoint", "ckpt-0"}
    assert not (tmp_path / "worker-0").exists()


def test_t12_t13_t22_t23_hooks_run_on_every_worker_and_saving_listeners_on_the_chief(tmp_path, script, warm):
    """And the ps tasks, which serve meanwhile, leave with the others (T13)."""
    path = script(
        "import pathlib",
        "class Hook(ps.estimator.TrainingHook):",
        "    def after_create_session(self, session):",
        "        pathlib.Path(session.task + ' trains').touch()",
        "    def end(self, session):",
        "        print('hook ended', flush=True)",
        "class Listener(ps.estimator.CheckpointSaverListener):",
        "    def after_save(self, session, step):",
        "        print('saved', flush=True)",
        "def input_until_all_train():",
        "    batches = train_input()",
        "    while len(list(pathlib.Path().glob('* trains'))) < 3:",
        "        yield next(batches)",
        "config = ps.estimator.RunConfig(model_dir='run', train_distribute=ps.ParameterServerStrategy())",
        "spec = ps.estimator.TrainSpec(",
        "    input_until_all_train, hooks=[Hook()], saving_listeners=[Listener()])",
        "ps.estimator.train_and_evaluate(",
        "    ps.estimator.Estimator(model_fn, config=config), spec, ps.estimator.EvalSpec(eval_input))",
    )
    done = warm.launch("--ps", "2", "--workers", "3", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ended = {line.partition(" | ")[0] for line in lines if line.endswith("hook ended")}
    assert ended == {"chief:0", "worker:0", "worker:1"}
    assert {line.partition(" | ")[0] for line in lines if line.endswith("saved")} == {"chief:0"}


def test_q18_a_cluster_is_warm_started_by_its_chief_alone(tmp_path, script, warm):
    """Others need not see the files. No step changes anything, so it does not matter which checkpoint is read."""
    weights = {"weight": torch.full((1, 3), 7.0), "bias": torch.full((1,), 5.0)}
    save_file(weights, tmp_path / "weights.safetensors")
    path = script(
        "import json, os",
        "is_chief = json.loads(os.environ['TF_CONFIG'])['task']['type'] == 'chief'",
        "def resting_model_fn(mode):",
        "    spec = model_fn(mode)",
        "    spec.optimizer.param_groups[0]['lr'] = 0.0",
        "    return spec",
        "config = ps.estimator.RunConfig(model_dir='run', train_distribute=ps.ParameterServerStrategy())",
        "estimator = ps.estimator.Estimator(",
        "    resting_model_fn, config=config, warm_start_from='weights.safetensors' if is_chief else 'gone')",
        "ps.estimator.train_and_evaluate(",
        "    estimator, ps.estimator.TrainSpec(train_input, max_steps=20), ps.estimator.EvalSpec(eval_input))",
    )
    done = warm.launch("--ps", "2", "--workers", "2", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 variables begin with values of weights.safetensors" in done.stderr
    saved = SavedValues.at(latest_checkpoint(str(tmp_path / "run")))
    assert all(torch.equal(saved.read(name), value) for name, value in weights.items())


def test_t14_a_cluster_whose_run_is_over_ends_at_once(tmp_path, script, warm):
    """The chief has nothing to do and says so: workers learn it, and the ps tasks leave."""
    path = script("main('run', 60)")
    for _ in range(2):
        done = warm.launch("--ps", "2", "--workers", "3", path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "training is skipped" in done.stderr
    assert "failed" not in done.stderr
    assert "stopping it" not in done.stderr


@pytest.mark.whole_program
def test_everything_is_killed_and_training_goes_on_from_the_last_checkpoint(tmp_path, script, warm):
    endless = script("main('run', 10**9, keep_checkpoint_max=3)")
    with started(*LAUNCH, "--ps", "2", "--workers", "2", endless, cwd=tmp_path) as process:
        saved = 0
        for line in process.stderr:
            saved += "saved a checkpoint" in line
            if saved == 4:
                break
        assert saved == 4
        kill_all(process.pid)
    reached = steps(tmp_path / "run")[-1]
    assert reached >= 100
    last = state(tmp_path / "run")["latest"]

    done = warm.launch("--workers", "2", script(f"main('run', {reached + 120})"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f" INFO chief:0 restores run/{last}" in done.stderr
    assert steps(tmp_path / "run")[-1] >= reached + 120
    assert not list((tmp_path / "run").glob("*.tmp-*"))


@contextlib.contextmanager
def started(*command: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        list(map(str, command)), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def kill_all(launcher: int) -> None:
    """SIGKILL for a launcher and all that it has started, without a chance for any of them to tidy up."""
    family = [launcher, *descendants(launcher)]
    assert len(family) > 4
    handles = [os.pidfd_open(pid) for pid in family]
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def descendants(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    return [found for child in children for found in (child, *descendants(child))]
