"""Real processes that fail: what the others do then, and that nothing hangs."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest

from paramserver.cluster.task import Role, TaskId
from paramserver.launch import local
from paramserver.launch.spec import LaunchOptions
from paramserver.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.multiprocess

PATIENCE = 60.0
"""Seconds after which a test gives up; nothing takes this long when it works."""

FOR_EVER = 10**9

PRELUDE = """
import os, sys, torch
from torch import nn
import paramserver as ps
torch.set_num_threads(1)
def say(*words):
    print(*words, flush=True)
def prepare(width=3):
    global strategy, model, optimizer
    strategy = ps.ParameterServerStrategy(session_creation_timeout=60)
    model = nn.Linear(4, width)
    model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
"""

GO_ON_WHEN_TOLD = """
prepare()
train(3)
say("trains")
sys.stdin.readline()
train(20)
say("finished at", strategy.global_step)
"""

GO_ON_FOR_EVER = f"prepare()\ntrain(3)\nsay('trains')\ntrain({FOR_EVER})"


class Task:
    """A process that is a task; its complaints are kept."""

    def __init__(self, command, env, pass_fds=()):
        self._process = subprocess.Popen(
            command, env={**os.environ, **env}, pass_fds=pass_fds, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def await_word(self, word):
        """Read what it says until it says the word."""
        said = []
        for line in self._process.stdout:
            said.append(line)
            if word in line:
                return line
        raise AssertionError(f"it never said {word!r}, but {said} and {self._process.stderr.read()}")

    def tell(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self):
        """SIGKILL, and the proof that it died of it."""
        self._process.kill()
        assert self._process.wait(PATIENCE) == -9

    def ends(self):
        """Its exit code and its complaints."""
        _, complaints = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, complaints

    def close(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start(tmp_path):
    """Starts a task of some code in an environment."""
    with contextlib.ExitStack() as stack:

        def start(code, env):
            script = tmp_path / f"script{len(list(tmp_path.iterdir()))}.py"
            script.write_text(PRELUDE + code)
            task = Task([sys.executable, str(script)], env)
            stack.callback(task.close)
            return task

        yield start


@pytest.fixture
def start_ps():
    """Starts a ps as a process on the port of a task of a `LocalCluster`, whose own server it replaces."""
    with contextlib.ExitStack() as stack:

        def start_ps(cluster, index):
            cluster.servers[index].stop()
            address = cluster.spec.address(TaskId(Role.PS, index))
            host, _, port = address.rpartition(":")
            with socket.create_server((host, int(port))) as listening:
                env = cluster.environment(f"ps:{index}") | {"PARAMSERVER_LISTEN_FD": str(listening.fileno())}
                command = [sys.executable, "-m", "paramserver", "server"]
                task = Task(command, env, pass_fds=[listening.fileno()])
            stack.callback(task.close)
            return task

        yield start_ps


@pytest.fixture
def cluster():
    with LocalCluster(ps=2, workers=2, token="right", grace=0) as cluster:
        yield cluster


@contextlib.contextmanager
def joined(cluster):
    """Has the ps tasks of this process end by themselves within the block; their errors."""
    errors = []

    def join(server):
        try:
            server.join()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            errors.append(error)

    threads = [threading.Thread(target=join, args=(server,)) for server in cluster.servers]
    for thread in threads:
        thread.start()
    try:
        yield errors
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        for server in cluster.servers:
            server.request_stop()


def test_a_worker_that_is_killed_disturbs_nobody_and_ps_leave_with_0(cluster, start, start_ps):
    servers = [start_ps(cluster, index) for index in range(2)]
    chief = start(GO_ON_WHEN_TOLD, cluster.environment("chief:0"))
    worker = start(GO_ON_FOR_EVER, cluster.environment("worker:0"))
    worker.await_word("trains")
    chief.await_word("trains")
    worker.kill()
    chief.tell()
    chief.await_word("finished")
    assert [task.ends() for task in (chief, *servers)] == [(0, "")] * 3


def test_a_ps_that_is_killed_makes_workers_fail_with_its_name(cluster, start, start_ps):
    servers = [start_ps(cluster, index) for index in range(2)]
    workers = [start(GO_ON_FOR_EVER, cluster.environment(task)) for task in ("chief:0", "worker:0")]
    for worker in workers:
        worker.await_word("trains")
    servers[1].kill()
    for worker in workers:
        code, complaint = worker.ends()
        assert code == 1
        assert "ps:1" in complaint
    code, complaint = servers[0].ends()
    assert code == 1
    assert "chief:0 failed" in complaint
    assert "ps:1" in complaint


def test_a_worker_with_a_wrong_token_is_refused_and_the_others_go_on(cluster, start):
    with joined(cluster) as errors:
        worker = start("prepare()", cluster.environment("worker:0") | {"PARAMSERVER_TOKEN": "wrong"})
        chief = start(GO_ON_WHEN_TOLD, cluster.environment("chief:0"))
        code, complaint = worker.ends()
        assert code == 1
        assert "ps:0 refused worker:0: it does not hold the token of this run" in complaint
        chief.tell()
        assert chief.ends() == (0, "")
    assert errors == []


def test_a_worker_with_another_model_is_refused_and_the_others_go_on(cluster, start):
    with joined(cluster) as errors:
        worker = start("prepare(width=5)", cluster.environment("worker:0"))
        chief = start(GO_ON_WHEN_TOLD, cluster.environment("chief:0"))
        code, complaint = worker.ends()
        assert code == 1
        assert "variable 'weight' on ps:0: the chief's model has float32[3, 4], this worker's has float32[5, 4]" in (
            complaint
        )
        chief.tell()
        assert chief.ends() == (0, "")
    assert errors == []


def test_what_ended_the_chief_reaches_the_others(cluster, start):
    with joined(cluster) as errors:
        fail = "prepare()\nsys.stdin.readline()\nraise OSError('the disk is full')"
        chief = start(fail, cluster.environment("chief:0"))
        worker = start(GO_ON_FOR_EVER, cluster.environment("worker:0"))
        worker.await_word("trains")
        chief.tell()
        for task, who in ((chief, ""), (worker, "chief:0 failed, and with it the run: ")):
            code, complaint = task.ends()
            assert code == 1
            assert f"{who}OSError: the disk is full" in complaint
    assert ["OSError: the disk is full" in str(error) for error in errors] == [True, True]


def test_a_worker_that_leaves_before_it_connects_does_not_hang_the_run(tmp_path):
    script = tmp_path / "script.py"
    leave = "if 'worker' in os.environ['TF_CONFIG'].split('task')[-1]: sys.exit()\n"
    script.write_text(PRELUDE + leave + "prepare()\ntrain(3)")
    lines = []
    options = LaunchOptions(script=str(script), ps=1, workers=2, grace=0.1)
    assert local.launch(options, on_output=lines.append) == 0
    assert [line.text for line in lines if "error" in line.text.lower()] == []
