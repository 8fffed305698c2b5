"""A lane and an update rule of another package in a launched run, and a ps where that package is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.multiprocess.warm import PATIENCE
from tests.toys.installed import ROOT, install

import paramserver
from paramserver.testing import LocalCluster

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import torch
from torch import nn
from tests.toys.signum import Signum
import paramserver as ps

model = nn.Linear(3, 1)
strategy = ps.ParameterServerStrategy()
model, optimizer = strategy.prepare(model, Signum(model.parameters(), lr=0.1))
for _ in range(5):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
lanes = {lane.name for lane in strategy.client.lanes.each()}
strategy.close()
print("trained over", *lanes, flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    lanes, rules = "unix = tests.toys.unix_lane:KIND", "Signum = tests.toys.signum:Signum"
    install(tmp_path / "site", "toys", paramserver_lanes=lanes, paramserver_rules=rules)
    path = [str(tmp_path / "site"), str(ROOT), str(Path(paramserver.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def test_a_launched_run_uses_both(script, env):
    command = [sys.executable, "-m", "paramserver", "launch", "--ps", "1", "--workers", "2", "--lane", "unix", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("trained over unix socket") == 2


def test_a_ps_without_the_rule_names_the_package_to_install(script, env):
    with LocalCluster(ps=1, workers=1, grace=0) as cluster:
        own = {**env, **cluster.environment("chief:0")}
        command = [sys.executable, str(script)]
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert "'Signum' here; install the package 'toys', which brings it, on the ps tasks" in done.stderr
