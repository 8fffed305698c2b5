"""Every process of a run is killed once and started again, and the run ends as if nothing had been (N04)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import paramserver as ps
from paramserver.checkpoint_files import VALUES_INDEX, read_index, read_tensors

pytestmark = pytest.mark.multiprocess

PATIENCE = 60.0

JOB = '''
import itertools, logging, os, sys
import torch
from torch import nn
import paramserver as ps
from paramserver.estimator import Estimator, EstimatorSpec, EvalSpec, RunConfig, TrainingHook, TrainSpec
from paramserver.estimator import train_and_evaluate

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
TRUTH = torch.tensor([3.0, -2.0, 0.5])

class Told(TrainingHook):
    """Says from time to time that it trains."""

    def __init__(self):
        self.steps = 0

    def after_run(self, context, values):
        self.steps += 1
        if self.steps % 100 == 0:
            print("trains", os.getpid(), flush=True)

def model_fn(mode):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return EstimatorSpec(
        mode, model=model, loss_fn=lambda model, x, y: ((model(x)[:, 0] - y) ** 2).mean(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01), training_hooks=[Told()])

def data():
    while not os.path.exists(sys.argv[1] + "/enough"):
        x = torch.rand(8, 3)
        yield x, x @ TRUTH

config = RunConfig(
    model_dir=sys.argv[1] + "/run", save_checkpoints_secs=1, log_step_count_steps=None,
    train_distribute=ps.ParameterServerStrategy())
train_and_evaluate(
    Estimator(model_fn, config=config), TrainSpec(data),
    EvalSpec(lambda: itertools.islice(data(), 1), steps=1, start_delay_secs=0, throttle_secs=1))
'''

WORKERS = ["chief:0", "worker:0", "worker:1"]
TRAINS = re.compile(r"(\S+) \| trains (\d+)")


class Launched:
    """A run that is going on, and what it says."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paramserver", "launch", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        self.said: list[str] = []

    def kill(self, task: str) -> None:
        os.kill(self._pid(task), signal.SIGKILL)
        self._read_until(lambda line: line.startswith(f"{task} was killed by SIGKILL"))

    def await_progress(self) -> None:
        """Until every worker has said twice that it trains: the first time may have been on its way."""
        missing = Counter(dict.fromkeys(WORKERS, 2))

        def is_enough(line: str) -> bool:
            if found := TRAINS.match(line):
                missing[found[1]] -= 1
            return all(count <= 0 for count in missing.values())

        self._read_until(is_enough)

    def end(self) -> int:
        with self._lines:
            self.said += list(self._lines)
        return self._process.wait(PATIENCE)

    def abandon(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._lines.close()

    def _read_until(self, is_it: Callable[[str], bool]) -> None:
        for line in self._lines:
            self.said.append(line)
            if is_it(line):
                return
        raise AssertionError("the run has ended:\n" + "".join(self.said[-30:]))

    def _pid(self, task: str) -> int:
        """The living process of a task, by its TF_CONFIG."""
        role, index = task.split(":")
        launcher = self._process.pid
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            with contextlib.suppress(OSError, StopIteration):  # one that has ended has no environment
                entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                config = next(entry for entry in entries if entry.startswith(b"TF_CONFIG="))
                if json.loads(config.partition(b"=")[2])["task"] == {"type": role, "index": int(index)}:
                    return int(child)
        raise AssertionError(f"{task} has no process")


@pytest.mark.timeout(150)
def test_every_process_is_killed_once(tmp_path: Path) -> None:
    """Over shared memory; tests/integration/test_recovery.py loses ps tasks on both lanes."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    tasks = ["ps:0", "ps:1", *WORKERS]
    random.Random(4).shuffle(tasks)  # noqa: S311  # no secret
    run = Launched("--ps", "2", "--workers", "3", "--restarts", "3", str(script), str(tmp_path))
    try:
        run.await_progress()
        for task in tasks:
            run.kill(task)
            run.await_progress()
        (tmp_path / "enough").touch()
        code = run.end()
    except BaseException:
        run.abandon()
        raise
    assert code == 0, "".join(run.said[-30:])
    last = ps.estimator.latest_checkpoint(str(tmp_path / "run"))
    assert last is not None
    weights = dict(read_tensors(Path(last), read_index(Path(last, VALUES_INDEX))))
    torch.testing.assert_close(weights["weight"][0], torch.tensor([3.0, -2.0, 0.5]), atol=0.1, rtol=0)
    assert json.loads((tmp_path / "run" / "checkpoint").read_text())["finished"] is True
