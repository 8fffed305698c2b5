"""A loop of one's own loses a ps, and then its chief, and ends as if nothing had been."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from tests.multiprocess.warm import Warm

from paramserver.estimator.checkpoint import read_values

pytestmark = [pytest.mark.multiprocess]

PROGRAM = """
import os, signal
from pathlib import Path
import torch
import paramserver as ps

MAX_STEPS = 12

def build():
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return net, torch.optim.Adam(net.parameters(), lr=0.1)

def loss_of(net, step):
    return (net(torch.arange(12.0).view(3, 4) / 10 + step / 10) - 1).square().mean()

def is_first(name):
    is_there = Path(name).exists()
    Path(name).touch()
    return not is_there

def kill(task):
    siblings = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    (process,) = [int(each) for each in siblings if Path(f"/proc/{each}/comm").read_text().strip() == task]
    os.kill(process, signal.SIGKILL)

if __name__ == "__main__":
    strategy = ps.ParameterServerStrategy()
    strategy.restore("run")
    with strategy.scope():
        seen = ps.Variable(0, name="seen")
    net, optimizer = strategy.prepare(*build())
    print("begins at step", strategy.global_step, flush=True)
    while (step := strategy.global_step) < MAX_STEPS:
        try:
            if (step == 6 and is_first("ps is killed")):
                kill("ps:1")
            if (step == 9 and is_first("chief is killed")):
                kill("chief:0")
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
            seen.assign_add(1)
            if strategy.global_step % 4 == 0:
                strategy.save("run")
        except ps.errors.UnavailableError:
            strategy.recover()
    strategy.wait_for_workers()
    strategy.save("run")
"""


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_a_loop_ends_as_if_nothing_had_been(tmp_path: Path, mark: dict[str, str], warm: Warm, lane: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    done = warm.launch("--ps", "2", "--restarts", "2", "--lane", lane, script, env=mark, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for task in ("ps:1", "chief:0"):
        assert f"{task} was killed by SIGKILL (code 137); it is started again in 0.5 s (1 of 2)" in said
    assert "ps:1 came back empty; all ps tasks go back to" in said
    # The step that met the loss may have been applied by ps:0.
    assert re.search(r"2 updates are lost \(back from step 6 to 4\)|3 updates are lost \(back from step 7 to 4\)", said)
    begun = [line.rpartition(" ")[2] for line in said.splitlines() if "begins at step" in line]
    assert begun == ["0", "9"], "the second chief goes on with what the ps tasks hold"
    program = runpy.run_path(str(script))
    net, optimizer = program["build"]()
    for step in range(program["MAX_STEPS"]):
        optimizer.zero_grad()
        program["loss_of"](net, step).backward()
        optimizer.step()
    expected = {**net.state_dict(), "seen": torch.tensor(12)}
    torch.testing.assert_close(read_values(str(tmp_path / "run" / "ckpt-12")), expected)
