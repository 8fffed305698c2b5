"""Bad input and faults of a run, as the user sees them: one clear error, a code that is not zero, and an end.

Programs are run through ``paramserver launch`` and ``paramserver server``, so that it is the command line that is
tested. Nobody's traceback is shown but that of the user's own code.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm

pytestmark = [pytest.mark.multiprocess]

PROGRAM = """
import json, math, os, sys
import torch
import paramserver as ps

WIDTH = 3

def is_me(task):
    me = json.loads(os.environ["TF_CONFIG"])["task"]
    return task == f"{me['type']}:{me['index']}"

def model_fn(mode):
    model = torch.nn.Linear(WIDTH, 1)
    return ps.estimator.EstimatorSpec(
        mode, model=model, loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01))

def train_input():
    while True:
        x = torch.rand(8, WIDTH)
        yield x, x.sum(1)

def main(model_dir="run", max_steps=60, **options):
    options = {"save_checkpoints_steps": 50, "log_step_count_steps": None} | options
    config = ps.estimator.RunConfig(
        model_dir=model_dir, train_distribute=ps.ParameterServerStrategy(), **options)
    ps.estimator.train_and_evaluate(
        ps.estimator.Estimator(model_fn, config=config),
        ps.estimator.TrainSpec(train_input, max_steps=max_steps),
        ps.estimator.EvalSpec(train_input, steps=2, start_delay_secs=0))
"""


class Outcome:
    """What a command printed to stderr, and how it ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        self.lines = done.stderr.splitlines()
        self.text = done.stderr

    def of(self, task: str) -> list[str]:
        """The lines of a task, without its name."""
        return [line.removeprefix(f"{task} | ") for line in self.lines if line.startswith(f"{task} | ")]

    def errors(self, task: str) -> list[str]:
        return [line for line in self.of(task) if line.startswith("error: ")]

    @property
    def has_traceback(self) -> bool:
        return "Traceback" in self.text


@pytest.fixture
def run_alone(tmp_path: Path, warm: Warm) -> Callable[..., Outcome]:
    """Runs the program above as the one task that ``tf_config`` names."""

    def run_alone(tf_config: str, *lines: str, **env: str) -> Outcome:
        script = tmp_path / "script.py"
        script.write_text(PROGRAM + "\n".join(lines))
        return Outcome(warm.run("paramserver.launch.task", script, cwd=tmp_path, env={"TF_CONFIG": tf_config, **env}))

    return run_alone


@pytest.fixture
def launch(tmp_path: Path, warm: Warm) -> Callable[..., Outcome]:
    """Runs the program above, with some lines of the test's own, as a chief, a worker and a ps."""

    def launch(*lines: str, workers: int = 2) -> Outcome:
        script = tmp_path / "script.py"
        script.write_text(PROGRAM + "\n".join(lines))
        return Outcome(warm.launch("--workers", str(workers), script, cwd=tmp_path))

    return launch


# --- who is where


TASK = {"type": "ps", "index": 0}
CLUSTER = {"chief": ["127.0.0.1:0"], "ps": ["127.0.0.1:2222"]}


@pytest.mark.parametrize(
    ("tf_config", "message"),
    [
        ("{not json", "TF_CONFIG"),
        (json.dumps([1]), "TF_CONFIG"),
        (json.dumps({"task": TASK}), "cluster"),
        (json.dumps({"cluster": {"chief": ["a:1"]}, "task": TASK}), "ps"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "ps", "index": 7}}), "7"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "cook", "index": 0}}), "cook"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "chief", "index": 0}}), "chief"),
    ],
)
def test_a_server_that_cannot_know_who_it_is_says_so(warm, tmp_path, tf_config, message):
    outcome = Outcome(warm.run("paramserver", "server", cwd=tmp_path, env={"TF_CONFIG": tf_config}))
    assert (outcome.code, len(outcome.lines)) == (1, 1), outcome.text
    assert outcome.lines[0].startswith("error: ")
    assert message in outcome.lines[0]


@pytest.mark.parametrize(
    ("tf_config", "message"),
    [
        ("{not json", "TF_CONFIG"),
        (json.dumps({"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "chief", "index": 0}}), "ps"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 0}}), "worker"),
        (json.dumps({"cluster": CLUSTER, "task": {"type": "chief", "index": 3}}), "3"),
    ],
)
def test_a_script_that_cannot_know_who_it_is_says_so(run_alone, tf_config, message):
    outcome = run_alone(tf_config, "main()")
    assert (outcome.code, len(outcome.lines)) == (1, 1), outcome.text
    assert outcome.lines[0].startswith("error: ")
    assert message in outcome.lines[0]


def test_a_port_that_is_taken_is_named(warm, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        tf_config = json.dumps({"cluster": {"chief": ["127.0.0.1:0"], "ps": [address]}, "task": TASK})
        outcome = Outcome(warm.run("paramserver", "server", cwd=tmp_path, env={"TF_CONFIG": tf_config}))
    assert (outcome.code, len(outcome.lines)) == (1, 1), outcome.text
    assert address in outcome.lines[0]


def test_a_ps_that_never_comes_up_is_named(run_alone):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cluster = {"chief": ["127.0.0.1:0"], "ps": [f"127.0.0.1:{silent.getsockname()[1]}"]}
        tf_config = json.dumps({"cluster": cluster, "task": {"type": "chief", "index": 0}})
        outcome = run_alone(tf_config, "main(session_creation_timeout_secs=1)")
    assert outcome.code == 75
    assert not outcome.has_traceback, outcome.text
    (error,) = (line for line in outcome.lines if line.startswith("error: "))
    assert "ps:0" in error
    assert "1 s" in error


def test_a_worker_that_is_started_again_after_the_end_leaves(run_alone):
    """It was lost, so the ps tasks have not waited for it."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        cluster = {"chief": ["127.0.0.1:0"], "worker": ["127.0.0.1:0"], "ps": [address]}
        tf_config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}})
        outcome = run_alone(tf_config, "main()", PARAMSERVER_RUN_FILE="/no/such/run.json")
    assert outcome.code == 0
    assert outcome.lines[-1].endswith(f" INFO ps:0 at {address} has left: the run is over")


# --- what the user's own code does


def test_a_nan_loss_of_the_chief_ends_the_run(launch):
    outcome = launch(
        "def train_input():",
        "    yield torch.ones(8, WIDTH), torch.ones(8)",
        "    yield torch.full((8, WIDTH), math.nan), torch.ones(8)",
        "main()",
        workers=1,
    )
    assert outcome.code == 1
    assert not outcome.has_traceback, outcome.text
    (error,) = outcome.errors("chief:0")
    assert "the loss of chief:0 is NaN at global step 1" in error


@pytest.mark.parametrize("function", ["model_fn", "train_input"])
def test_an_exception_of_the_chief_reaches_the_user_and_ends_the_run(launch, function):
    outcome = launch(
        f"original = {function}",
        f"def {function}({'mode' if function == 'model_fn' else ''}):",
        "    if is_me('chief:0'):",
        "        raise LookupError('no such file')",
        f"    return original({'mode' if function == 'model_fn' else ''})",
        "main()",
    )
    assert outcome.code == 1
    assert outcome.of("chief:0")[-1] == "LookupError: no such file"
    assert "Traceback (most recent call last):" not in outcome.of("worker:0") + outcome.of("ps:0")
    assert "the run was stopped" in outcome.lines[-1]


def test_faults_of_workers_reach_the_user_and_the_others_go_on(launch, tmp_path):
    """A wrong token, an exception in model_fn and one in input_fn; the chief waits until they have happened."""
    os.mkfifo(tmp_path / "worker 2 fails")
    outcome = launch(
        "build, data = model_fn, train_input",
        "def model_fn(mode):",
        "    if is_me('worker:1'):",
        "        raise LookupError('no such model')",
        "    return build(mode)",
        "def train_input():",
        "    if is_me('worker:2'):",
        "        open('worker 2 fails', 'w').close()",
        "        raise LookupError('no such file')",
        "    if is_me('chief:0'):",
        "        open('worker 2 fails').close()",
        "    return data()",
        "if is_me('worker:0'):",
        "    os.environ['PARAMSERVER_TOKEN'] = 'wrong'",
        "main()",
        workers=4,
    )
    assert outcome.code == 1
    (refused,) = outcome.errors("worker:0")
    assert "token" in refused
    assert outcome.of("worker:1")[-1] == "LookupError: no such model"
    assert outcome.of("worker:2")[-1] == "LookupError: no such file"
    assert list((tmp_path / "run").glob("ckpt-6*"))
    healthy = [*outcome.of("chief:0"), *outcome.of("ps:0"), *outcome.of("worker:0")]
    assert "Traceback (most recent call last):" not in healthy


# --- checkpoints and model_dir


def _cut_short(checkpoint: Path) -> None:
    file = next(checkpoint.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])


def _without_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()


def _as_it_was(checkpoint: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "lines", "message"),
    [
        (_cut_short, (), "was it cut short?"),
        (_without_index, (), "is cut short: it has no model.safetensors.index.json"),
        (_as_it_was, ("WIDTH = 4",), "does it belong to another model?"),
    ],
    ids=["cut short", "no index", "another model"],
)
def test_a_checkpoint_that_cannot_be_used_is_one_error(launch, tmp_path, damage, lines, message):
    first = launch("main()", workers=1)
    assert first.code == 0, first.text
    damage(tmp_path / "run" / "ckpt-60")
    outcome = launch(*lines, "main(max_steps=100)", workers=1)
    assert outcome.code == 1
    assert not outcome.has_traceback, outcome.text
    (error,) = outcome.errors("chief:0")
    assert message in error
    assert "ckpt-60" in error
    assert (tmp_path / "run" / "ckpt-60").is_dir()


def test_a_model_dir_that_cannot_be_written_is_named(launch, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = launch("main('file/run')")
    assert outcome.code == 1
    assert not outcome.has_traceback, outcome.text
    (error,) = outcome.errors("chief:0")
    assert "file/run" in error
    assert "cannot be written" in error
