"""A run on several hosts: which task is where, and how all find each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from tests.multihost.hosts import Host
from tests.multiprocess.warm import Task

FIRST_PORT = 2222
TOKEN = "right"

OWN_LOOP = """
import sys
import torch
import paramserver as ps

def say(*words):
    print(*words, flush=True)

strategy = ps.ParameterServerStrategy(session_creation_timeout=100)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))  # four variables for two ps tasks
model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9))
say("lanes", strategy.client.lanes)

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
"""

ESTIMATOR = """
import sys
import torch
import paramserver as ps

def say(*words):
    print(*words, flush=True)

def model_fn(mode):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    return ps.estimator.EstimatorSpec(
        mode, model=model, loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.Adagrad(model.parameters(), lr=0.01))

def train_input():
    while True:
        x = torch.rand(8, 4)
        yield x, x.sum(1)

def eval_input():
    return [(torch.ones(4, 4), torch.full((4,), 4.0))]

class Teller(ps.estimator.TrainingHook):
    def after_create_session(self, session):
        say("begins at", session.global_step)

def main(max_steps, **options):
    config = ps.estimator.RunConfig(
        model_dir="/tmp/model", train_distribute=ps.ParameterServerStrategy(),
        **({"save_checkpoints_steps": 50, "log_step_count_steps": None} | options))
    ps.estimator.train_and_evaluate(
        ps.estimator.Estimator(model_fn, config=config),
        ps.estimator.TrainSpec(train_input, max_steps=max_steps, hooks=[Teller()]),
        ps.estimator.EvalSpec(eval_input, start_delay_secs=0, throttle_secs=0))
"""


def by_name(host: Host) -> str:
    """The name of a host, as a part of an address."""
    return host.name


def by_ipv4(host: Host) -> str:
    """Its IPv4 address."""
    return host.ipv4


def by_ipv6(host: Host) -> str:
    """Its IPv6 address, in brackets."""
    return f"[{host.ipv6}]"


class Cluster:
    """Starts the tasks of one run by ``paramserver task``, the same line for each.

    Args:
        hosts: The host of each task, such as ``worker:0``.
        program: The program of the tasks that train; it is put onto each host.
        called: How the hosts are called in TF_CONFIG.
        options: Options of ``paramserver task``.
        args: Arguments of the program.
        env: The environment of all tasks.
    """

    def __init__(
        self,
        hosts: Mapping[str, Host],
        program: str,
        *,
        called: Callable[[Host], str] = by_name,
        options: tuple[str, ...] = (),
        args: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.hosts = dict(hosts)
        self._program = program
        self._options = options
        self._args = args
        self._env = {"PARAMSERVER_TOKEN": TOKEN} if env is None else env
        self._addresses: dict[str, list[str]] = {}
        for number, (task, host) in enumerate(hosts.items()):
            role, _, _ = task.partition(":")
            if role != "evaluator":
                self._addresses.setdefault(role, []).append(f"{called(host)}:{FIRST_PORT + number}")

    def start(self, task: str, **env: str) -> Task:
        """Start a task on its host."""
        role, _, index = task.partition(":")
        host = self.hosts[task]
        config = {"cluster": self._addresses, "task": {"type": role, "index": int(index)}}
        command = ("task", *self._options, host.write("/tmp/train.py", self._program), *self._args)  # noqa: S108  # the host's own
        return host.start("paramserver", *command, env={"TF_CONFIG": json.dumps(config), **self._env, **env})

    def end(self, *tasks: Task) -> None:
        """Wait for the end of tasks, each with code 0. Name a ps last: it would wait for a worker that has failed."""
        for task in tasks:
            code, complaints = task.ends()
            assert code == 0, complaints

    def start_all(self) -> list[Task]:
        """Start all tasks, in their order."""
        return [self.start(task) for task in self.hosts]
