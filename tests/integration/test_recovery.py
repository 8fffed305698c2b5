"""N04: a ps or a connection is lost, and a worker goes on with the same model over new lanes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn, optim

import paramserver as ps
from paramserver.errors import UnavailableError

PATIENCE = 30.0


class Cluster:
    """ps tasks that can be lost and started again at their addresses, as a launcher does it."""

    def __init__(self, num_ps: int, num_workers: int) -> None:
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_ps)]
        workers = [f"127.0.0.1:{index + 1}" for index in range(num_workers)]  # nobody listens there
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in self._sockets]
        self.spec = ps.ClusterSpec({"worker": workers, "ps": addresses})
        self.servers = [self._serve(index) for index in range(num_ps)]
        self._strategies: list[ps.ParameterServerStrategy] = []

    def strategy(self, worker: int = 0, *, pipeline: bool = False) -> ps.ParameterServerStrategy:
        resolver = ps.SimpleClusterResolver(self.spec, task_type="worker", task_id=worker)
        self._strategies.append(
            ps.ParameterServerStrategy(resolver, pipeline=pipeline, session_creation_timeout=PATIENCE)
        )
        return self._strategies[-1]

    def lose(self, index: int) -> None:
        """End a ps and all that it holds, and start it again."""
        self.servers[index].stop()
        self.servers[index] = self._serve(index)

    def close(self) -> None:
        for strategy in self._strategies:
            strategy.close()
        for server in self.servers:
            server.stop()
        for each in self._sockets:
            each.close()

    def _serve(self, index: int) -> ps.Server:
        return ps.Server(self.spec, "ps", index, descriptor=self._sockets[index].dup().detach())


@contextlib.contextmanager
def a_cluster(num_ps: int = 2, num_workers: int = 1) -> Iterator[Cluster]:
    cluster = Cluster(num_ps, num_workers)
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(params=["auto", "tcp"], autouse=True)
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMSERVER_LANE", request.param)


def prepared(strategy: ps.ParameterServerStrategy) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))


def step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(4, 3)).square().sum().backward()
    optimizer.step()


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_chief_brings_back_what_a_lost_ps_held() -> None:
    with a_cluster() as cluster:
        strategy = cluster.strategy()
        model, optimizer = prepared(strategy)
        step(model, optimizer)
        before = contents(model)
        cluster.lose(1)
        with pytest.raises(UnavailableError, match="ps:1"):
            step(model, optimizer)
        strategy.recover()
        biases = [name for name in before if name.endswith("bias")]  # round robin has put them on ps:1
        assert all(torch.equal(contents(model)[name], before[name]) for name in biases)
        step(model, optimizer)
        assert strategy.global_step >= 2
        assert [status.global_step for status in strategy.client.status()] == [strategy.global_step] * 2  # type: ignore[union-attr]


def test_a_pipelined_worker_goes_on_from_the_values_that_it_had() -> None:
    """The step after the loss learns of it; the update that was under way is lost with the ps."""
    with a_cluster() as cluster:
        strategy = cluster.strategy(pipeline=True)
        model, optimizer = prepared(strategy)
        for _ in range(3):
            step(model, optimizer)
        strategy.refresh()
        before = contents(model)
        cluster.lose(1)
        step(model, optimizer)
        with pytest.raises(UnavailableError, match="ps:1"):
            step(model, optimizer)
        strategy.recover()
        lost = [name for name in before if name.endswith("bias")]  # round robin has put them on ps:1
        assert all(torch.equal(contents(model)[name], before[name]) for name in lost)
        for _ in range(2):
            step(model, optimizer)
        strategy.refresh()
        assert not any(torch.equal(contents(model)[name], before[name]) for name in lost[1:])


def test_every_parameter_still_trains() -> None:
    with a_cluster() as cluster:
        strategy = cluster.strategy()
        model, optimizer = prepared(strategy)
        step(model, optimizer)
        for index in range(2):
            cluster.lose(index)
        strategy.recover()
        before = contents(model)
        step(model, optimizer)
        changed = {name for name, value in contents(model).items() if not torch.equal(value, before[name])}
        assert changed >= {name for name, _ in model.named_parameters()} - {"0.bias"}  # a norm takes that one back


def test_other_workers_wait_for_the_chief() -> None:
    with a_cluster(num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        chief, other = cluster.strategy(0), cluster.strategy(1)
        joining = pool.submit(prepared, other)
        model, optimizer = prepared(chief)
        theirs, their_optimizer = joining.result(PATIENCE)
        cluster.lose(0)
        recovering = pool.submit(other.recover)
        chief.recover()
        recovering.result(PATIENCE)
        step(model, optimizer)
        step(theirs, their_optimizer)
        assert other.global_step == chief.global_step + 1


def test_a_connection_that_is_lost_loses_nothing() -> None:
    with a_cluster() as cluster:
        strategy = cluster.strategy()
        model, optimizer = prepared(strategy)
        step(model, optimizer)
        before = contents(model)
        assert strategy.client is not None
        strategy.client.lanes.close()
        strategy.recover(initialize=lambda *_: pytest.fail("the ps tasks still hold the values"))
        torch.testing.assert_close(contents(model), before)
        assert strategy.global_step == 1


def test_the_programs_own_variables_are_there_again() -> None:
    with a_cluster(num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        chief, other = cluster.strategy(0), cluster.strategy(1)

        def program(strategy: ps.ParameterServerStrategy) -> tuple[ps.Variable, Any]:
            with strategy.scope():
                seen = ps.Variable([1, 2], name="seen")
            return seen, prepared(strategy)

        joining = pool.submit(program, other)
        mine, _keep = program(chief)
        theirs, _keep_too = joining.result(PATIENCE)
        mine.assign_add(torch.tensor([10, 10]))
        cluster.lose(0)
        cluster.lose(1)
        recovering = pool.submit(other.recover)
        chief.recover()
        recovering.result(PATIENCE)
        theirs.assign_add(torch.tensor([1, 1]))
        assert mine.value().tolist() == [2, 3], "with the values that they were made with"


def test_recover_is_for_a_cluster() -> None:
    with pytest.raises(RuntimeError, match="recover: .* has no prepared model on the ps tasks of a cluster"):
        ps.ParameterServerStrategy().recover()
