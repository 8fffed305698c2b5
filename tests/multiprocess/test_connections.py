"""Who is connected to whom, as the kernel knows it, in a cluster of real processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

PATIENCE = 60.0
"""Seconds after which a test gives up; nothing takes this long when it works."""

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


class Task:
    """A process that is a task."""

    def __init__(self, code: str, *arguments: str, env: dict[str, str], pass_fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=os.environ | env, pass_fds=pass_fds, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def await_word(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n", self.ends()

    def ends(self, *lines: str) -> tuple[int, str, str]:
        """Tell it lines, and wait for its exit code, what it still says, and its complaints."""
        said, complaints = self.process.communicate("".join(f"{line}\n" for line in lines), timeout=PATIENCE)
        return self.process.returncode, said, complaints

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Cluster:
    """The processes of a chief, a worker that has a neighbour which never starts, two ps tasks and an evaluator."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        self.ports = [listener.getsockname()[1] for listener in listeners]
        self.ps = [self._ps(index, listener) for index, listener in enumerate(listeners)]
        self.chief = self._trainer("chief", directory, PARAMSERVER_LANE="tcp")
        self.worker = self._trainer("worker", directory, PARAMSERVER_LANE="auto")
        self.evaluator = self._trainer("evaluator", directory)

    def _ps(self, index: int, listener: socket.socket) -> Task:
        env = self._environment("ps", index) | {"PARAMSERVER_LISTEN_FD": str(listener.fileno())}
        task = Task(SERVES, env=env, pass_fds=(listener.fileno(),))
        listener.close()
        self._stack.callback(task.close)
        return task

    def _trainer(self, role: str, directory: Path, **env: str) -> Task:
        task = Task(TRAINS, str(directory / "run"), env=self._environment(role, 0) | env)
        self._stack.callback(task.close)
        return task

    def _environment(self, role: str, index: int) -> dict[str, str]:
        nowhere = "127.0.0.1:0"
        addresses = [f"127.0.0.1:{port}" for port in self.ports]
        cluster = {"chief": [nowhere], "worker": [nowhere] * 2, "ps": addresses, "evaluator": [nowhere]}
        return {
            "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": role, "index": index}}),
            "PARAMSERVER_TOKEN": "the run's",
        }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(tmp_path, stack)


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
    for inode in _inodes(task.process.pid):
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
    """F02; F06 and W07: worker:1 never starts, and neither the start nor a step of anyone waits for it."""
    cluster.chief.await_word("trains")
    cluster.worker.await_word("trains")
    cluster.evaluator.await_word("evaluates")

    assert sockets(cluster.chief) == Sockets(connected=sorted(cluster.ports)), "the chief, by TCP"
    assert sockets(cluster.worker) == Sockets(local=2), "the worker, by local sockets: one to each ps"
    assert sockets(cluster.evaluator) == Sockets()
    chief_ports = []
    for task, port in zip(cluster.ps, cluster.ports, strict=True):
        found = sockets(task)
        (name,) = (listened for listened in found.listens if listened != port)
        assert found == Sockets(listens=found.listens, connected=found.connected, accepted=[name])
        assert len(found.listens) == 2
        chief_ports += found.connected
    assert len(chief_ports) == 2, "the ps tasks have one TCP connection each, and it is the chief's"
    assert not set(chief_ports) & set(cluster.ports), "no ps is connected to a ps"

    assert cluster.worker.ends("go on") == (0, "finished\n", "")
    assert cluster.chief.ends("go on")[:2] == (0, "finished\n")
    assert [task.ends()[:2] for task in cluster.ps] == [(0, "finished\n")] * 2
    code, said, _ = cluster.evaluator.ends("go on", "and on")
    assert (code, said) == (0, "evaluates\nfinished\n")
