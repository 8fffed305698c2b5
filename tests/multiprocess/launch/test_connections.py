"""Who is connected to whom, as the kernel knows it, in a cluster of real processes."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.multiprocess.warm import SCRIPT, Task, Warm

pytestmark = pytest.mark.multiprocess

TCP_LISTENS, UNIX_LISTENS = "0A", 0x10000

TRAINS = """
import sys, torch
import paramserver as ps

def pause(word):
    print(word, flush=True)
    sys.stdin.readline()

def model_fn(mode):
    model = torch.nn.Linear(3, 1)
    return ps.estimator.EstimatorSpec(
        mode, model=model, loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01))

def train_input():
    for step in range(8):
        if step == 4:
            pause("trains")
        yield torch.ones(2, 3), torch.ones(2)

def eval_input():
    pause("evaluates")
    yield torch.ones(2, 3), torch.ones(2)

torch.set_num_threads(1)
config = ps.estimator.RunConfig(model_dir=sys.argv[1], train_distribute=ps.ParameterServerStrategy())
ps.estimator.train_and_evaluate(
    ps.estimator.Estimator(model_fn, config=config),
    ps.estimator.TrainSpec(train_input),
    ps.estimator.EvalSpec(eval_input, start_delay_secs=0, throttle_secs=0))
print("finished", flush=True)
"""

SERVES = """
import json, os
import paramserver as ps
config = json.loads(os.environ["TF_CONFIG"])
ps.Server(config["cluster"], "ps", config["task"]["index"], grace=0.1).join()
print("finished", flush=True)
"""


class Cluster:
    """The processes of a chief, a worker that has a neighbour which never starts, two ps tasks and an evaluator."""

    def __init__(self, directory: Path, warm: Warm) -> None:
        self._warm = warm
        self._serves, self._trains = directory / "ps.py", directory / "train.py"
        self._serves.write_text(SERVES)
        self._trains.write_text(TRAINS)
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
            self.ports = [listener.getsockname()[1] for listener in listeners]
            self.ps = [self._ps(index, listener) for index, listener in enumerate(listeners)]
        self.chief = self._trainer("chief", PARAMSERVER_LANE="tcp")
        self.worker = self._trainer("worker", PARAMSERVER_LANE="auto")
        self.evaluator = self._trainer("evaluator")

    def _ps(self, index: int, listener: socket.socket) -> Task:
        env = self._environment("ps", index)
        return self._warm.task(SCRIPT, self._serves, env=env, PARAMSERVER_LISTEN_FD=listener.fileno())

    def _trainer(self, role: str, **env: str) -> Task:
        env = self._environment(role, 0) | env
        return self._warm.task(SCRIPT, self._trains, self._trains.with_name("run"), env=env)

    def _environment(self, role: str, index: int) -> dict[str, str]:
        nowhere = "127.0.0.1:0"
        addresses = [f"127.0.0.1:{port}" for port in self.ports]
        cluster = {"chief": [nowhere], "worker": [nowhere] * 2, "ps": addresses, "evaluator": [nowhere]}
        return {
            "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": role, "index": index}}),
            "PARAMSERVER_TOKEN": "the run's",
        }


@pytest.fixture
def cluster(tmp_path: Path, warm: Warm) -> Cluster:
    return Cluster(tmp_path, warm)


@dataclass
class Sockets:
    """The sockets of a process.

    Attributes:
        listens: What it listens on: TCP ports, and names of local sockets.
        connected: The TCP ports that it is connected to, sorted.
        accepted: Through which of its local sockets others have come.
        local: How many connections to local sockets of others it has.
        other: Sockets of another kind.
    """

    listens: list[int | str] = field(default_factory=list)
    connected: list[int] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    local: int = 0
    other: int = 0


def sockets(task: Task) -> Sockets:
    found = Sockets()
    tcp, unix = _table("tcp"), _table("unix")
    for inode in _inodes(task.pid):
        if row := tcp.get(inode):
            local, remote, state = row[1:4]
            if state == TCP_LISTENS:
                found.listens.append(_port(local))
            else:
                found.connected.append(_port(remote))
        elif row := unix.get(inode):
            name = row[7] if len(row) > 7 else ""
            if int(row[3], 16) & UNIX_LISTENS:
                found.listens.append(name)
            elif name:
                found.accepted.append(name)
            else:
                found.local += 1
        else:
            found.other += 1
    found.connected.sort()
    return found


def _inodes(pid: int) -> set[str]:
    links = (str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}


def _table(name: str) -> dict[str, list[str]]:
    """The rows of a table of the kernel, by inode."""
    column = {"tcp": 9, "unix": 6}[name]
    rows = (line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:])
    return {row[column]: row for row in rows}


def _port(address: str) -> int:
    return int(address.partition(":")[2], 16)


@pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="looks at the tables of a Linux kernel")
def test_everyone_talks_to_ps_tasks_only_and_nobody_is_missed(cluster: Cluster) -> None:
    """F02, Z15; F06, W07, Z13: worker:1 never starts, and neither the start nor a step of anyone waits for it."""
    cluster.chief.await_word("trains")
    cluster.worker.await_word("trains")
    cluster.evaluator.await_word("evaluates")

    each, heartbeats = sorted(cluster.ports), sorted(cluster.ports)
    assert sockets(cluster.chief) == Sockets(connected=sorted(each + heartbeats)), "the chief, by TCP"
    found = sockets(cluster.worker)
    assert found == Sockets(local=2, connected=heartbeats), "the worker, by local sockets: one to each ps"
    assert sockets(cluster.evaluator) == Sockets()
    peers = []
    for task, port in zip(cluster.ps, cluster.ports, strict=True):
        found = sockets(task)
        (name,) = (listened for listened in found.listens if listened != port)
        assert found == Sockets(listens=found.listens, connected=found.connected, accepted=[name])
        assert len(found.listens) == 2
        peers += found.connected
    assert len(peers) == 6, "by TCP each ps has the chief's lane, and two connections for heartbeats"
    assert not set(peers) & set(cluster.ports), "no ps is connected to a ps"

    cluster.worker.tell("go on")
    assert (*cluster.worker.ends(), cluster.worker.said) == (0, "", "trains\nfinished\n")
    cluster.chief.tell("go on")
    assert (cluster.chief.ends()[0], cluster.chief.said) == (0, "trains\nfinished\n")
    assert [(task.ends()[0], task.said) for task in cluster.ps] == [(0, "finished\n")] * 2
    cluster.evaluator.tell("go on")
    cluster.evaluator.tell("and on")
    code, _ = cluster.evaluator.ends()
    assert (code, cluster.evaluator.said) == (0, "evaluates\nevaluates\nfinished\n")
