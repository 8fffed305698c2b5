"""What tests of real processes share."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm

from paramserver.demo.run import IMPORTED
from paramserver.launch.fork_server import ForkServer, OwnForkServer
from paramserver.launch.spec import PRELOADED, LaunchOptions, runtime_variables

LINEAR = """
import sys
import torch
import paramserver as ps

def model_fn(mode):
    model = torch.nn.Linear(3, 1)
    return ps.estimator.EstimatorSpec(
        mode, model=model, loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01))

def train_input():
    while True:
        x = torch.rand(8, 3)
        yield x, x.sum(1)

def eval_input():
    return [(torch.ones(4, 3), torch.full((4,), 3.0))]

def main(model_dir, max_steps, **options):
    config = ps.estimator.RunConfig(
        model_dir=model_dir, train_distribute=ps.ParameterServerStrategy(),
        **({"save_checkpoints_steps": 50, "log_step_count_steps": None} | options))
    ps.estimator.train_and_evaluate(
        ps.estimator.Estimator(model_fn, config=config),
        ps.estimator.TrainSpec(train_input, max_steps=max_steps),
        ps.estimator.EvalSpec(eval_input, start_delay_secs=0, throttle_secs=0))
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Writes a program: the little model above, and some lines of the test's own."""

    def write(*lines: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(LINEAR + "\n".join(lines))
        return path

    return write


@pytest.fixture(scope="session")
def warm_server() -> Iterator[ForkServer]:
    """A process that has imported torch, and what else the processes of tests import."""
    env = runtime_variables(LaunchOptions(script="any", threads=1), cores=1)
    server = OwnForkServer(sys.executable, env, (*PRELOADED, *IMPORTED))
    server.make_ready()
    yield server
    server.close()


@pytest.fixture
def warm(warm_server: ForkServer) -> Iterator[Warm]:
    """Starts programs that find torch imported."""
    warm = Warm(warm_server)
    yield warm
    warm.close()


@pytest.fixture
def mark() -> Iterator[dict[str, str]]:
    """An environment that every process of a run inherits; in the end, none of them may be left."""
    mark = uuid.uuid4().hex
    yield {**os.environ, "PARAMSERVER_TEST_MARK": mark, "COLUMNS": "80"}
    assert _processes_with(mark.encode()) == []


def _processes_with(text: bytes) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if text in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found
