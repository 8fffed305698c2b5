"""A signal to one process of a launched run: the exit code, who ends, and what is left. See docs/failures.md."""

from __future__ import annotations

import contextlib
import os
import re
import select
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
MORE = 300
"""Steps that the worker makes while the chief waits for it, where a signal comes at that moment."""
OF_THE_CHIEF = ("saves", "ends")
"""Moments that the chief tells of, whatever process gets the signal."""

PROGRAM = f"""
import os, sys, time
import torch
import paramserver as ps

loop, model_dir, more = sys.argv[1:]
task = ps.cluster.task_name()
last_step = {STEPS} + (int(more) if task == "worker:0" else 0)

def say(word):
    print("phase:", word, os.getppid(), flush=True)

class Phases(ps.estimator.TrainingHook):
    def after_run(self, context, values):
        tell(values.global_step)

    def while_waiting(self, context):
        say_once("ends")

told = set()
def tell(step):
    if step > 20:
        say_once("trains")
    if step > 150:
        say_once("late")

def say_once(word):
    if word not in told:
        told.add(word)
        say(word)

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
        ps.estimator.TrainSpec(batches, max_steps=last_step, hooks=[Phases()], saving_listeners=[Saving()]),
        ps.estimator.EvalSpec(lambda: [(torch.ones(4, 3), torch.full((4,), 3.0))], start_delay_secs=0, throttle_secs=0))

def own():
    strategy = ps.ParameterServerStrategy()
    model = torch.nn.Linear(3, 1)
    strategy.restore(model_dir)
    model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    step = 0
    for x, y in batches():
        if strategy.global_step >= last_step:
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
    say("ends")
    strategy.wait_for_workers()
    strategy.save(model_dir)

say("begins")
(own if loop == "own" else estimator)()
say("done")
"""


@dataclass(frozen=True)
class Row:
    """One signal and what comes of it.

    Attributes:
        loop: ``own`` or ``estimator``.
        role: The process that gets the signal: a task, or ``launcher``.
        signal: The signal.
        code: The exit code of the launcher.
        moment: When the signal is sent: the task ``begins``, chief and worker train (``trains``, ``late``), the chief
            ``saves``, or it has made its steps and waits for the worker (``ends``).
        restarts: The ``--restarts`` of the launch.
        evaluator: Whether there is an evaluator.
        says: Part of the output.
        finishes: Whether the chief comes to the end of its program, with all steps saved.
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
        yield Row(loop, "chief:0", "TERM", 0, "saves", 1, says="started again", finishes=True, saves=saves)
        yield Row(loop, "ps:0", "TERM", 0, "saves", 1, says="started again", finishes=True)
        yield Row(loop, "chief:0", "KILL", 0, "begins", 1, says="started again", finishes=True)
        yield Row(loop, "ps:0", "TERM", 0, "begins", 1, says="started again", finishes=True)
        yield Row(loop, "chief:0", "TERM", 143, "ends", says="chief:0 was asked to leave by SIGTERM", saves=saves)
        yield Row(loop, "chief:0", "KILL", 0, "ends", 1, says="started again", finishes=True)
        yield Row(loop, "ps:0", "KILL", 0, "ends", 1, says="started again", finishes=True)
        yield Row(loop, "worker:0", "TERM", 143, "ends", says="worker:0 was asked to leave by SIGTERM", finishes=True)
    yield Row("own", "ps:0", "TERM", 143, "ends", says="ps:0 was asked to leave by SIGTERM")
    yield Row("own", "launcher", "TERM", 143, "ends", says="stopping the run (SIGTERM)")
    yield Row("own", "ps:0", "INT", 130, says="ps:0 was asked to leave by SIGINT")
    for role in ("ps:0", "chief:0", "worker:0"):
        for number, code in (("HUP", 129), ("USR1", 138), ("USR2", 140)):
            yield Row("own", role, number, code, says=f"{role} was killed by SIG{number}", finishes=role == "worker:0")
    yield Row("own", "launcher", "HUP", 129, says="stopping the run (SIGHUP)")
    yield Row("own", "launcher", "USR1", 0, says="SIGUSR1: no task has a handler for it", finishes=True)
    yield Row("own", "launcher", "USR2", 0, says="SIGUSR2: no task has a handler for it", finishes=True)
    yield Row(
        "estimator", "evaluator:0", "TERM", 143, says="evaluator:0 was asked to leave", finishes=True, evaluator=True
    )
    yield Row(
        "estimator", "evaluator:0", "TERM", 143, "begins", says="evaluator:0 was asked", finishes=True, evaluator=True
    )
    yield Row(
        "estimator", "evaluator:0", "TERM", 143, "ends", says="evaluator:0 was asked", finishes=True, evaluator=True
    )
    yield Row("estimator", "evaluator:0", "KILL", 137, says="evaluator:0 was killed", finishes=True, evaluator=True)
    yield Row("estimator", "evaluator:0", "KILL", 0, restarts=1, says="started again", finishes=True, evaluator=True)
    yield Row("estimator", "ps:0", "TERM", 143, says="ps:0 was asked to leave", evaluator=True)
    yield Row(
        "estimator", "chief:0", "TERM", 0, restarts=1, says="started again", finishes=True, saves=True, evaluator=True
    )
    yield Row("estimator", "launcher", "TERM", 143, says="stopping the run", saves=True, evaluator=True)


ROWS = tuple(_rows())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_signal(row: Row, tmp_path: Path, warm: Warm, mark: dict[str, str]) -> None:
    program, model_dir = tmp_path / "program.py", tmp_path / "model"
    program.write_text(PROGRAM)
    options = ["--ps", "2", "--workers", "2", "--restarts", str(row.restarts), *["--evaluator"] * row.evaluator]
    command = [sys.executable, "-m", "paramserver", "launch", *options, str(program)]
    command += [row.loop, str(model_dir), str(MORE if row.moment == "ends" else 0)]
    with (
        warm.launcher(mark) as how,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how) as launcher,
    ):
        assert launcher.stdout is not None
        said = ""
        waiting = {"chief:0"} if row.moment in OF_THE_CHIEF or row.role in ("ps:0", "launcher") else {row.role}
        if row.moment == "trains":
            waiting = {"chief:0", "worker:0"}
        for line in launcher.stdout:
            said += line
            task, _, text = line.partition(" | ")
            if text.startswith(f"phase: {row.moment} "):
                waiting.discard(task)
                parent = int(text.split()[-1])
            if not waiting:
                break
        number = signal.Signals[f"SIG{row.signal}"]
        os.kill(launcher.pid if row.role == "launcher" else _process(row.role, parent), number)
        said += launcher.communicate(timeout=PATIENCE)[0]
    if row.signal == "KILL" and row.role == "launcher":
        _await_end(mark)  # of the guard, which has killed the tasks
    assert (launcher.returncode, row.says in said) == (row.code, True), said
    finished = "chief:0 | phase: done" in said
    assert (finished, "is asked to leave: saved a checkpoint" in said) == (row.finishes, row.saves), said
    assert not finished or max(map(int, re.findall(r"saved a checkpoint of step (\d+)", said))) >= STEPS, said
    if row.code not in (0, -9):
        assert said.splitlines()[-1].startswith("error: ") or row.role == "launcher", said


def _process(task: str, parent: int) -> int:
    """Return the id of the process of a task, which like all others was forked from one parent."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            if (status["Name"].strip(), int(status["PPid"])) == (task, parent):
                return int(process.name)
    raise AssertionError(f"there is no process of {task}")


def _await_end(mark: dict[str, str]) -> None:
    """Wait for the end of all processes with a mark in their environment."""
    poll = select.poll()
    descriptors = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark["PARAMSERVER_TEST_MARK"].encode() in (process / "environ").read_bytes():
                descriptors.append(os.pidfd_open(int(process.name)))
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(PATIENCE * 1000)
        poll.unregister(descriptor)
        os.close(descriptor)
