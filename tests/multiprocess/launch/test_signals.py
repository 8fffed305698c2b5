"""A signal to one process of a launched run: the exit code, who ends, and what is left. See docs/failures.md."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm
from tests.patience import patience

pytestmark = [pytest.mark.multiprocess, pytest.mark.whole_program]

PATIENCE = patience(60.0)
STEPS = 500

PROGRAM = f"""
import os, sys, time
import torch
import paramserver as ps

loop, model_dir = sys.argv[1:]
task = ps.cluster.task_name()

def say(word):
    print("phase:", word, flush=True)

class Phases(ps.estimator.TrainingHook):
    def after_run(self, context, values):
        tell(values.global_step)

told = set()
def tell(step):
    if step > 20 and "trains" not in told:
        told.add("trains")
        say("trains")
    if step > 150 and "late" not in told:
        told.add("late")
        say("late")

class Saving(ps.estimator.CheckpointSaverListener):
    def before_save(self, session, step):
        if step > 20:
            say("saves")

def loss_of(model, x, y):
    return (model(x)[:, 0] - y).square().mean()

def batches():
    while True:
        time.sleep(0.004)
        x = torch.rand(8, 3)
        yield x, x.sum(1)

def estimator():
    def model_fn(mode):
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return ps.estimator.EstimatorSpec(mode, model=model, loss_fn=loss_of, optimizer=optimizer)
    config = ps.estimator.RunConfig(
        model_dir=model_dir, train_distribute=ps.ParameterServerStrategy(), save_checkpoints_steps=100,
        log_step_count_steps=None)
    ps.estimator.train_and_evaluate(
        ps.estimator.Estimator(model_fn, config=config),
        ps.estimator.TrainSpec(batches, max_steps={STEPS}, hooks=[Phases()], saving_listeners=[Saving()]),
        ps.estimator.EvalSpec(lambda: [(torch.ones(4, 3), torch.full((4,), 3.0))], start_delay_secs=0, throttle_secs=0))

def own():
    strategy = ps.ParameterServerStrategy()
    model = torch.nn.Linear(3, 1)
    strategy.restore(model_dir)
    model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    step = 0
    for x, y in batches():
        if strategy.global_step >= {STEPS}:
            break
        try:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
        except ps.errors.UnavailableError:
            strategy.recover()
        tell(strategy.global_step)
        if strategy.is_chief and strategy.global_step // 100 > step // 100:
            say("saves")
            strategy.save(model_dir)
        step = strategy.global_step
    strategy.wait_for_workers()
    strategy.save(model_dir)

say("begins")
(own if loop == "own" else estimator)()
say("ends")
"""


@dataclass(frozen=True)
class Row:
    """One signal and what comes of it.

    Attributes:
        loop: ``own`` or ``estimator``.
        role: The process that gets the signal: a task, or ``launcher``.
        signal: The signal.
        code: The exit code of the launcher.
        moment: The phase of the task, or of the chief, at which the signal is sent.
        restarts: The ``--restarts`` of the launch.
        evaluator: Whether there is an evaluator.
        says: Part of the output.
        finishes: Whether the training is complete in the end.
        saves: Whether a checkpoint is saved because of the signal.
    """

    loop: str
    role: str
    signal: str
    code: int
    moment: str = "trains"
    restarts: int = 0
    evaluator: bool = False
    says: str = ""
    finishes: bool = False
    saves: bool = False

    def __str__(self) -> str:
        options = [f"restarts {self.restarts}"] * bool(self.restarts) + ["evaluator"] * self.evaluator
        return " ".join((self.loop, self.role, self.signal, self.moment, *options))


def _rows() -> Iterator[Row]:
    for loop in ("own", "estimator"):
        saves = loop == "estimator"
        yield Row(loop, "ps:0", "TERM", 143, says="ps:0 was asked to leave by SIGTERM")
        yield Row(loop, "ps:0", "KILL", 137, says="ps:0 was killed by SIGKILL")
        yield Row(loop, "chief:0", "TERM", 143, says="chief:0 was asked to leave by SIGTERM", saves=saves)
        yield Row(loop, "chief:0", "INT", 130, says="chief:0 was asked to leave by SIGINT", saves=saves)
        yield Row(loop, "chief:0", "KILL", 137, says="chief:0 was killed by SIGKILL")
        yield Row(loop, "worker:0", "TERM", 143, says="worker:0 was asked to leave by SIGTERM", finishes=True)
        yield Row(loop, "worker:0", "KILL", 137, says="worker:0 was killed by SIGKILL", finishes=True)
        yield Row(loop, "launcher", "TERM", 143, says="stopping the run (SIGTERM)", saves=saves)
        yield Row(loop, "launcher", "INT", 130, says="stopping the run (SIGINT)", saves=saves)
        yield Row(loop, "launcher", "TERM", 143, "begins", says="stopping the run (SIGTERM)")
        yield Row(loop, "launcher", "KILL", -9)
        for role in ("ps:0", "chief:0", "worker:0"):
            for number in ("TERM", "KILL"):
                kept = saves and role == "chief:0" and number == "TERM"
                yield Row(loop, role, number, 0, restarts=1, says="started again in 0.5 s", finishes=True, saves=kept)
        yield Row(loop, "chief:0", "TERM", 0, "saves", 1, says="started again", finishes=True)
        yield Row(loop, "ps:0", "TERM", 0, "saves", 1, says="started again", finishes=True)
        yield Row(loop, "chief:0", "KILL", 0, "begins", 1, says="started again", finishes=True)
        yield Row(loop, "ps:0", "TERM", 0, "begins", 1, says="started again", finishes=True)
    yield Row("own", "ps:0", "INT", 130, says="ps:0 was asked to leave by SIGINT")
    yield Row("own", "ps:0", "HUP", 129, says="ps:0 was killed by SIGHUP")
    yield Row("own", "chief:0", "HUP", 129, says="chief:0 was killed by SIGHUP")
    yield Row("own", "worker:0", "USR1", 138, says="worker:0 was killed by SIGUSR1", finishes=True)
    yield Row("own", "launcher", "HUP", 129, says="stopping the run (SIGHUP)")
    yield Row("own", "launcher", "USR1", 0, says="SIGUSR1: no task has a handler for it", finishes=True)
    yield Row("own", "launcher", "USR2", 0, says="SIGUSR2: no task has a handler for it", finishes=True)
    yield Row(
        "estimator", "evaluator:0", "TERM", 143, says="evaluator:0 was asked to leave", finishes=True, **with_evaluator
    )
    yield Row("estimator", "evaluator:0", "KILL", 0, restarts=1, says="started again", finishes=True, evaluator=True)
    yield Row("estimator", "ps:0", "TERM", 143, says="ps:0 was asked to leave", evaluator=True)
    yield Row(
        "estimator", "chief:0", "TERM", 0, restarts=1, says="started again", finishes=True, saves=True, **with_evaluator
    )
    yield Row("estimator", "launcher", "TERM", 143, says="stopping the run", saves=True, evaluator=True)


ROWS = tuple(_rows())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_signal(row: Row, tmp_path: Path, warm: Warm, mark: dict[str, str]) -> None:
    program, model_dir = tmp_path / "program.py", tmp_path / "model"
    program.write_text(PROGRAM)
    options = ["--ps", "2", "--workers", "2", "--restarts", str(row.restarts), *["--evaluator"] * row.evaluator]
    command = [sys.executable, "-m", "paramserver", "launch", *options, str(program), row.loop, str(model_dir)]
    with (
        warm.launcher(mark) as how,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how) as launcher,
    ):
        assert launcher.stdout is not None
        said = ""
        waiting = {row.role} if row.moment != "saves" and row.role.startswith(("chief", "worker")) else {"chief:0"}
        if row.moment == "trains":
            waiting |= {"chief:0", "worker:0"}
        for line in launcher.stdout:
            said += line
            task, _, text = line.partition(" | ")
            if text.strip() == f"phase: {row.moment}":
                waiting.discard(task)
            if not waiting:
                break
        number = signal.Signals[f"SIG{row.signal}"]
        os.kill(launcher.pid if row.role == "launcher" else _process(row.role, mark), number)
        said += launcher.communicate(timeout=PATIENCE)[0]
    assert (launcher.returncode, row.says in said) == (row.code, True), said
    saved = f"saved a checkpoint of step {STEPS}" in said or f"step {STEPS + 1} to" in said
    assert (saved, "is asked to leave: saved a checkpoint" in said) == (row.finishes, row.saves), said
    if row.code not in (0, -9):
        assert said.splitlines()[-1].startswith("error: ") or row.role == "launcher", said


def _process(task: str, mark: dict[str, str]) -> int:
    """Return the id of the process of a task."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            is_task = (process / "comm").read_text().strip() == task
            if is_task and mark["PARAMSERVER_TEST_MARK"].encode() in (process / "environ").read_bytes():
                return int(process.name)
    raise AssertionError(f"there is no process of {task}")
