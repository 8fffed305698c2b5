"""Ray from Python: functions as tasks, and the trainer of Ray Train, each in a program of its own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.ray.fleet import Command, Fleet

pytestmark = [pytest.mark.ray, pytest.mark.multiprocess]

FUNCTION = """
import json, pathlib, sys
import paramserver.integrations.ray as on_ray

def train(steps, fails, folder):
    import time
    import torch
    import paramserver as ps
    strategy = ps.ParameterServerStrategy(session_creation_timeout=100)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.001))
    while len(list(folder.iterdir())) < 2:  # else a chief of so few steps could end before a worker has begun
        (folder / str(strategy.is_chief)).touch()
        time.sleep(0.02)
    for _ in range(steps):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    if fails and strategy.is_chief:
        raise KeyError("wrong data")
    strategy.wait_for_workers()
    return [strategy.global_step, sorted(ps.RayClusterResolver().cluster_spec().jobs)]

def main(**options):
    arguments = (20, FAILS, pathlib.Path(sys.argv[2]))
    return on_ray.launch(train, arguments, ps=2, workers=2, ray=on_ray.RayOptions(address=sys.argv[1]), **options)
"""

TRAINER = """
import json, os, pathlib, signal, sys, tempfile
import ray
from ray import data, train
from paramserver.integrations.ray import ParameterServerTrainer

EPOCHS = 3

def rows():
    return [{"a": i % 5 / 5, "b": i % 3 / 3, "y": i % 5 / 5 + i % 3 / 3} for i in range(160)]

def loop(config):
    import torch
    import paramserver as ps
    strategy = ps.ParameterServerStrategy(session_creation_timeout=100)
    begun = train.get_checkpoint()
    if begun is not None:
        with begun.as_directory() as folder:
            strategy.restore(folder)
            model, optimizer = prepare(strategy)
    else:
        model, optimizer = prepare(strategy)
    first = strategy.global_step
    shard = train.get_dataset_shard("train")
    epoch = round(first / 20)
    while epoch < EPOCHS:
        epoch += 1
        seen = 0
        for batch in shard.iter_torch_batches(batch_size=8):
            inputs = torch.stack([batch["a"], batch["b"]], 1).float()
            optimizer.zero_grad()
            loss = (model(inputs)[:, 0] - batch["y"].float()).square().mean()
            loss.backward()
            optimizer.step()
            seen += len(inputs)
        metrics = {"loss": loss.item(), "seen": seen, "first": first, "chief": strategy.is_chief}
        if strategy.is_chief:
            with tempfile.TemporaryDirectory() as folder:
                strategy.save(folder)
                train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))
        else:
            train.report(metrics)
        config["after"](epoch, strategy)

def prepare(strategy):
    import torch
    model = torch.nn.Linear(2, 1)
    return strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))

def fit(after, **options):
    ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
    trainer = ParameterServerTrainer(
        loop,
        num_ps=2,
        train_loop_config={"after": after},
        datasets={"train": data.from_items(rows())},
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(storage_path=str(pathlib.Path("results").resolve()), **options),
    )
    return trainer.fit()
"""

KILL = """
def after(epoch, strategy):
    mark = pathlib.Path(FOLDER, "killed")
    if epoch == 2 and strategy.is_chief and not mark.exists():
        mark.touch()
        run = os.environ["PARAMSERVER_RAY_RUN"].encode()
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdecimal() and b"paramserver\\0server" in (entry / "cmdline").read_bytes():
                if run in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
"""


def start(fleet: Fleet, folder: Path, program: str) -> Command:
    (folder / "here").mkdir()
    return fleet.start(folder, sys.executable, program, fleet.address, str(folder / "here"))


def told(command: Command) -> dict[str, object]:
    """The object that a program has printed."""
    found = re.search(r"^told (.*)", command.said, re.MULTILINE)
    assert found is not None, command.said
    answer = json.loads(found[1])
    assert isinstance(answer, dict)
    return answer


def test_a_function_gives_the_result_of_each_task(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    program = write(FUNCTION.replace("FAILS", "False"), "print('told', json.dumps(main()))")
    run = start(fleet, tmp_path, program)
    assert run.ends() == 0, run.said
    results = told(run)
    assert sorted(results) == ["chief:0", "worker:0"]
    assert results["chief:0"] == [40, ["chief", "ps", "worker"]]
    assert "ps:0 | " in run.said
    fleet.await_idle()


def test_an_error_of_a_function_is_raised(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    run = start(fleet, tmp_path, write(FUNCTION.replace("FAILS", "True"), "main()"))
    assert run.ends() == 1, run.said
    assert "KeyError: 'wrong data'" in run.said.splitlines()[-1]
    fleet.await_idle()


def test_a_trainer_with_data_goes_on_from_its_checkpoint_when_a_ps_is_lost(
    fleet: Fleet, write: Callable[..., str], tmp_path: Path
) -> None:
    kill = KILL.replace("FOLDER", repr(str(tmp_path)))
    config = "failure_config=train.FailureConfig(max_failures=2)"
    shown = "json.dumps(dict(result.metrics, path=result.checkpoint.path, error=result.error))"
    run = start(fleet, tmp_path, write(TRAINER, kill, f"result = fit(after, {config})", f"print('told', {shown})"))
    assert run.ends() == 0, run.said
    assert (tmp_path / "killed").exists()
    result = told(run)
    assert isinstance(result["first"], int)
    assert result["first"] > 0  # it began with the values of a checkpoint
    assert result["seen"] == 80  # half of the rows: a shard
    assert result["chief"] is True
    assert result["error"] is None
    assert isinstance(result["loss"], float)
    assert result["loss"] < 0.3
    assert list(Path(str(result["path"])).glob("ckpt-*"))
    fleet.await_idle()
