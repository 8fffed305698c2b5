"""A run whose workers are not known when it begins, in a cluster as an operator of dynamic workers writes it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import torch
from tests.patience import patience

import paramserver as ps
from paramserver.cluster import server_task
from paramserver.errors import ConfigError

TIMEOUT = patience(30.0)


@pytest.fixture
def set_task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes this process a task of the run, for what is made next."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        sockets = [one, other]
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]

        def set_task(role: str, index: int) -> socket.socket:
            own: dict[str, Any] = {"worker": {}, "ps": [addresses[index]]} if role == "ps" else {}
            jobs = own or {"worker": {index: f"w{index}:2222"}, "ps": addresses}
            monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": {"type": role, "index": index}}))
            return sockets[index % 2]

        yield set_task


def serve(set_task: Any, index: int) -> ps.Server:
    inherited = set_task("ps", index).dup().detach()
    cluster, task = server_task()
    return ps.Server(cluster, task.role, task.index, descriptor=inherited, grace=TIMEOUT)


def prepared(set_task: Any, index: int) -> tuple[Any, Any, Any]:
    set_task("worker", index)
    strategy = ps.ParameterServerStrategy(session_creation_timeout=TIMEOUT)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with strategy.scope():
        return strategy, *strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


def test_workers_come_as_they_like_and_the_run_ends_with_its_chief(set_task: Any) -> None:
    servers = [serve(set_task, index) for index in range(2)]
    chief, *of_chief = prepared(set_task, 0)
    late, *of_late = prepared(set_task, 5)
    step(*of_chief)
    step(*of_late)
    step(*of_chief)
    assert (chief.global_step, chief.is_chief, late.is_chief) == (3, True, False)
    assert servers[1].status().joined == ("worker:0", "worker:5")
    late.close()
    chief.close()
    for server in servers:
        server.join()


def test_buffers_of_an_unknown_number_of_workers_have_no_mean(set_task: Any) -> None:
    servers = [serve(set_task, index) for index in range(2)]
    set_task("worker", 0)
    strategy = ps.ParameterServerStrategy(session_creation_timeout=TIMEOUT)
    model = torch.nn.BatchNorm1d(4)
    with pytest.raises(ConfigError, match=r"'mean' \(running_mean\) need the number of workers"):
        strategy.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1), buffers={"running_mean": ps.BufferPolicy.MEAN}
        )
    strategy.close()
    for server in servers:
        server.join()
