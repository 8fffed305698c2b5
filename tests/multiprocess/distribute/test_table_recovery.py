"""The process of a ps is killed that holds part of a table, and training goes on from the last checkpoint."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from tests.multiprocess.warm import Warm

from paramserver.estimator.checkpoint import read_values

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
import torch.nn.functional as F
import paramserver as ps

ROWS, LAST, MAX_STEPS = 40, 6, 10

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(ROWS, 4, sparse=True)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, ids):
        return self.head(self.table(ids)).squeeze(1)

def adagrad(model):
    return torch.optim.Adagrad(model.parameters(), lr=0.1)

def loss_fn(model, ids, labels):
    return F.mse_loss(model(ids), labels)

def model_fn(mode):
    model = Net()
    return ps.estimator.EstimatorSpec(mode, model=model, loss_fn=loss_fn, optimizer=adagrad(model))

def batch(at):
    ids = torch.arange(at, at + 12) % ROWS
    return ids, ids / ROWS

def batches():
    for at in range(100):
        print("batch", at, flush=True)
        yield batch(at)

def name_of(process):
    return Path(f"/proc/{process}/comm").read_text().strip()

class Kills(ps.estimator.TrainingHook):
    def after_run(self, context, values):
        if values.global_step == LAST and not Path("killed").exists():
            Path("killed").touch()
            siblings = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
            (server,) = [int(process) for process in siblings if name_of(process) == "ps:1"]
            os.kill(server, signal.SIGKILL)

if __name__ == "__main__":
    config = ps.estimator.RunConfig(
        model_dir="run", save_checkpoints_steps=1, log_step_count_steps=None,
        train_distribute=ps.ParameterServerStrategy(variable_partitioner=ps.placement.FixedShards(2)))
    ps.estimator.train_and_evaluate(
        ps.estimator.Estimator(model_fn, config=config),
        ps.estimator.TrainSpec(batches, max_steps=MAX_STEPS, hooks=[Kills()]),
        ps.estimator.EvalSpec(batches, steps=1))
"""


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_a_ps_that_is_killed_gets_its_rows_back(tmp_path: Path, mark: dict[str, str], warm: Warm, lane: str) -> None:
    """With their slots: as each step is saved, nothing is lost but the batch of the step that was not made."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    done = warm.launch("--ps", "2", "--restarts", "1", "--lane", lane, script, env=mark, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ps:1 was killed by SIGKILL (code 137); it is started again in 0.5 s (1 of 1)" in done.stdout + done.stderr
    assert re.findall(r"chief:0 \| batch (\d+)", done.stdout) == list(map(str, range(11)))
    program = runpy.run_path(str(script))
    model = program["Net"]()
    optimizer = program["adagrad"](model)
    for at in [*range(6), *range(7, 11)]:
        optimizer.zero_grad()
        program["loss_fn"](model, *program["batch"](at)).backward()
        optimizer.step()
    torch.testing.assert_close(read_values(str(tmp_path / "run" / "ckpt-10")), dict(model.state_dict()))
