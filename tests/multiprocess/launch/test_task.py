"""``paramserver task``: real tasks of a run, all started by the same line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm
from tests.patience import patience

pytestmark = pytest.mark.multiprocess

SAY = """
import os, sys
print(os.getpid(), *(os.environ[name] for name in ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "PARAMSERVER_LANE")))
print(*sys.argv[1:])
print(sys.orig_argv[1:3], "torch" in sys.modules)
sys.exit(int(sys.argv[1]))
"""
WAIT = "import signal\nprint('waits', flush=True)\nsignal.pause()"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def config(role: str, *, port: int = 2222) -> dict[str, str]:
    cluster = {"chief": ["127.0.0.1:0"], "worker": ["127.0.0.1:0"], "ps": [f"127.0.0.1:{port}"]}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": role, "index": 0}})}


def test_a_whole_run_is_started_by_one_line(tmp_path: Path, script: Callable[..., Path], warm: Warm) -> None:
    path = str(script(f"main({str(tmp_path / 'model')!r}, 60)"))
    port = free_port()
    roles = ("evaluator", "chief", "worker", "ps")
    tasks = [warm.task("paramserver", "task", path, env=config(role, port=port)) for role in roles]
    for role, task in zip(roles, tasks, strict=True):
        code, complaints = task.ends()
        assert code == 0, complaints
        assert f"INFO {role}:0: " in complaints
    assert (tmp_path / "model" / "eval").exists()


def test_sigterm_ends_a_script_with_143(tmp_path: Path, warm: Warm) -> None:
    path = tmp_path / "wait.py"
    path.write_text(WAIT)
    task = warm.task("paramserver", "task", str(path), env=config("chief"))
    task.await_word("waits")
    os.kill(task.pid, signal.SIGTERM)
    assert task.ends() == (143, "")


@pytest.mark.parametrize("linger", ["0", "20"])
def test_sigterm_ends_a_ps_with_143(linger: str) -> None:
    """Also one that would linger, if a worker were connected."""
    command = [sys.executable, "-m", "paramserver", "task", "--log-format", "json", "not-needed.py"]
    env = {**os.environ, **config("ps", port=free_port()), "PARAMSERVER_LINGER": linger}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "ps:0 serves at 127.0.0.1" in json.loads(process.stderr.readline())["message"]
        process.terminate()
        leaves = [json.loads(line) for line in process.stderr]
    assert process.returncode == 143
    assert ["before the run is over" in line["message"] for line in leaves] == [True]


def test_the_program_starts_once_more_as_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "say.py"
    path.write_text(SAY)
    options = ["--threads", "3", "--lane", "tcp"]
    command = [sys.executable, "-B", "-m", "paramserver", "task", *options, str(path), "7", "--lane"]
    left = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "OMP_NUM_THREADS")}
    with subprocess.Popen(command, env=left | config("chief"), stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=patience(60))
    assert process.returncode == 7
    assert said.splitlines() == [
        f"{process.pid} glibc.malloc.tcache_count=0 3 tcp",
        "7 --lane",
        "['-B', '-m'] False",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "error: there is no script 'missing.py' in "),
        (["-m", "no.such"], "error: there is no module 'no.such' in "),
    ],
)
def test_a_script_that_is_not_there_is_one_line(arguments: list[str], message: str, warm: Warm) -> None:
    code, complaints = warm.task("paramserver", "task", *arguments, env=config("worker")).ends()
    assert code == 1
    assert complaints.startswith(message)
    assert complaints.count("\n") == 1
