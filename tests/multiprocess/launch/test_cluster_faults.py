"""Real processes that fail: what the others do then, and that nothing hangs."""

import contextlib
import os
import signal
import socket
import threading

import pytest
from tests.multiprocess.warm import PATIENCE, SCRIPT

from paramserver.cluster.task import Role, TaskId
from paramserver.launch import local
from paramserver.launch.lifecycle import Limits
from paramserver.launch.spec import LaunchOptions
from paramserver.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.multiprocess

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


@pytest.fixture
def start(tmp_path, warm):
    """Starts a task of some code in an environment."""

    def start(code, env):
        script = tmp_path / f"script{len(list(tmp_path.iterdir()))}.py"
        script.write_text(PRELUDE + code)
        return warm.task(SCRIPT, script, env=env)

    return start


@pytest.fixture
def start_ps(warm):
    """Starts a ps as a process on the port of a task of a `LocalCluster`, whose own server it replaces."""

    def start_ps(cluster, index):
        cluster.servers[index].stop()
        address = cluster.spec.address(TaskId(Role.PS, index))
        host, _, port = address.rpartition(":")
        with socket.create_server((host, int(port))) as listening:
            env = cluster.environment(f"ps:{index}")
            return warm.task("paramserver", "server", env=env, PARAMSERVER_LISTEN_FD=listening.fileno())

    return start_ps


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
    assert [task.ends()[0] for task in (chief, *servers)] == [0] * 3


def within_a_second(environment):
    """An environment in which a silent task counts as lost after a second."""
    return {**environment, "PARAMSERVER_HEARTBEAT_TIMEOUT": "1"}


def test_a_worker_that_is_stopped_counts_as_lost_and_the_run_ends_without_it(cluster, start, start_ps):
    servers = [start_ps(cluster, index) for index in range(2)]
    wait = "strategy.wait_for_workers()\nsay('has waited')\n"
    chief = start(GO_ON_WHEN_TOLD + wait, cluster.environment("chief:0"))
    worker = start(GO_ON_FOR_EVER, within_a_second(cluster.environment("worker:0")))
    worker.await_word("trains")
    chief.await_word("trains")
    os.kill(worker.pid, signal.SIGSTOP)
    chief.tell()
    chief.await_word("has waited")
    assert chief.ends()[0] == 0
    for server in servers:
        code, complaint = server.ends()
        assert code == 0
        assert "has not heard of worker:0 for 1 s: it counts as lost" in complaint


def test_a_ps_that_is_stopped_makes_workers_fail_with_its_name(cluster, start, start_ps):
    servers = [start_ps(cluster, index) for index in range(2)]
    tasks = ("chief:0", "worker:0")
    workers = [start(GO_ON_FOR_EVER, within_a_second(cluster.environment(task))) for task in tasks]
    for worker in workers:
        worker.await_word("trains")
    os.kill(servers[1].pid, signal.SIGSTOP)
    for worker in workers:
        code, complaint = worker.ends()
        assert code == 1
        assert "ps:1 has given no sign of life for 1 s, and counts as lost" in complaint


def test_a_worker_that_was_stopped_and_replaced_is_fenced_off(cluster, start, start_ps):
    """Two processes are worker:0: the one that an engine believed dead wakes up."""
    servers = [start_ps(cluster, index) for index in range(2)]
    chief = start(GO_ON_WHEN_TOLD, cluster.environment("chief:0"))
    recovers = "prepare()\ntrain(3)\nsay('trains')\nsys.stdin.readline()\n"
    recovers += "try: train(1)\nexcept ps.errors.UnavailableError: strategy.recover(timeout=20)\n"
    older = start(recovers, cluster.environment("worker:0"))
    older.await_word("trains")
    os.kill(older.pid, signal.SIGSTOP)
    newer = start(GO_ON_WHEN_TOLD, cluster.environment("worker:0"))
    newer.await_word("trains")
    os.kill(older.pid, signal.SIGCONT)
    older.tell()
    code, complaint = older.ends()
    assert code == 1
    assert "another process that is worker:0 was started after this one, and takes part in its place" in complaint
    for task in (chief, newer):
        task.tell()
        task.await_word("finished")
    assert [task.ends()[0] for task in (chief, newer, *servers)] == [0] * 4


def test_a_ps_that_is_killed_makes_workers_fail_with_its_name_and_all_may_come_back(cluster, start, start_ps):
    servers = [start_ps(cluster, index) for index in range(2)]
    workers = [start(GO_ON_FOR_EVER, cluster.environment(task)) for task in ("chief:0", "worker:0")]
    for worker in workers:
        worker.await_word("trains")
    servers[1].kill()
    for worker in workers:
        code, complaint = worker.ends()
        assert code == 1
        assert "ps:1" in complaint
    servers[1] = start_ps(cluster, 1)
    workers = [start("prepare()\ntrain(3)", cluster.environment(task)) for task in ("chief:0", "worker:0")]
    assert [task.ends()[0] for task in (*workers, *servers)] == [0] * 4


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


def test_a_worker_that_leaves_before_it_connects_does_not_hang_the_run(tmp_path, warm, monkeypatch):
    script = tmp_path / "script.py"
    leave = "if 'worker' in os.environ['TF_CONFIG'].split('task')[-1]: sys.exit()\n"
    script.write_text(PRELUDE + leave + "prepare()\ntrain(3)")
    lines = []
    with warm.launcher() as options:
        monkeypatch.setenv("PARAMSERVER_FORK_SERVER_FD", options["env"]["PARAMSERVER_FORK_SERVER_FD"])
        launched = LaunchOptions(script=str(script), ps=1, workers=2, limits=Limits(grace=0.1))
        assert local.launch(launched, on_output=lines.append) == 0
    assert [line.text for line in lines if "error" in line.text.lower()] == []
