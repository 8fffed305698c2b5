"""A3: strategies of one process are independent, alone and in a cluster, at once and one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn, optim

import paramserver as ps
from paramserver.testing.local_cluster import LocalCluster

Make = Callable[[], ps.ParameterServerStrategy]


@pytest.fixture(params=["alone", "auto", "tcp"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    if request.param == "alone":
        yield ps.ParameterServerStrategy
        return
    monkeypatch.setenv("PARAMSERVER_LANE", request.param)
    with LocalCluster(ps=2, workers=1) as cluster:
        yield lambda: ps.ParameterServerStrategy(cluster.resolver("chief:0"))


class Trainer:
    """A strategy and its model, whose weights begin with some value and lose 1 with each step."""

    def __init__(self, make: Make, value: float) -> None:
        self.strategy = make()
        model = nn.Linear(2, 1, bias=False)
        nn.init.constant_(model.weight, value)
        self.model, self.optimizer = self.strategy.prepare(model, optim.SGD(model.parameters(), lr=1.0))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()

    @property
    def state(self) -> tuple[int, list[float]]:
        return self.strategy.refresh(), self.model.weight[0].tolist()


def test_two_at_once(make: Make) -> None:
    first, second = Trainer(make, 1.0), Trainer(make, 5.0)
    assert second.state == (0, [5.0, 5.0])
    second.step()
    assert first.state == (0, [1.0, 1.0])
    first.step()
    first.step()
    assert first.state == (2, [-1.0, -1.0])
    assert second.state == (1, [4.0, 4.0])
    first.strategy.close()
    second.step()
    assert second.state == (2, [3.0, 3.0])
    second.strategy.close()


def test_a_cell_that_is_run_again_and_again(make: Make) -> None:
    """The one before is let go of while the next one is there already."""
    trainer = Trainer(make, 1.0)
    for value in (5.0, 7.0, 9.0):
        trainer.step()
        trainer = Trainer(make, value)
        gc.collect()
        assert trainer.state == (0, [value, value])
    trainer.strategy.close()


def test_variables_of_one_name(make: Make) -> None:
    strategies = [make(), make()]
    variables = []
    for number, strategy in enumerate(strategies):
        with strategy.scope():
            variables.append(ps.Variable(float(number), name="v"))
    variables[0].assign_add(10.0)
    assert [each.read_value().item() for each in variables] == [10.0, 1.0]
    for strategy in strategies:
        strategy.close()


def test_the_nth_strategies_of_all_workers_share_a_model() -> None:
    with LocalCluster(ps=1, workers=2) as cluster:

        def of(task: str) -> Make:
            return lambda: ps.ParameterServerStrategy(cluster.resolver(task))

        chief = [Trainer(of("chief:0"), value) for value in (1.0, 5.0)]
        worker = [Trainer(of("worker:0"), 0.0) for _ in range(2)]
        assert [each.state for each in worker] == [(0, [1.0, 1.0]), (0, [5.0, 5.0])]
        worker[1].step()
        assert [each.state for each in chief] == [(0, [1.0, 1.0]), (1, [4.0, 4.0])]
        for each in (*worker, *chief):
            each.strategy.close()
        cluster.servers[0].join()


def test_a_model_that_everyone_has_left_takes_no_memory() -> None:
    with LocalCluster(ps=1, workers=1) as cluster:
        trainer = Trainer(lambda: ps.ParameterServerStrategy(cluster.resolver("chief:0")), 1.0)
        held = cluster.servers[0].status().values_bytes
        for _ in range(3):
            trainer = Trainer(lambda: ps.ParameterServerStrategy(cluster.resolver("chief:0")), 1.0)
            gc.collect()
            trainer.step()  # by then the ps has heard of the goodbye, and perhaps not of the connection's end
        assert cluster.servers[0].status().values_bytes <= 2 * held
        trainer.strategy.close()
