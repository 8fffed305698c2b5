"""H2: rows of a table in several parts, looked up while others write: each is whole, and the one that was named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from tests.patience import patience
from torch import nn, optim

import paramserver as ps
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.shared_memory import SharedMemoryLane

ROWS, WIDTH, WRITERS, LOOKUPS, APART = 2000, 24, 3, 40, 1 << 12
PATIENCE = patience(60)


class Player:
    """A worker whose steps add 1 to every element of some rows."""

    def __init__(self, cluster: LocalCluster, task: str, parts: int) -> None:
        resolver = cluster.resolver(task)
        self.strategy = ps.ParameterServerStrategy(resolver, variable_partitioner=ps.placement.FixedShards(parts))
        model = nn.Embedding(ROWS, WIDTH, sparse=True)
        with torch.no_grad():
            model.weight.copy_(torch.arange(ROWS)[:, None].expand(ROWS, WIDTH) * APART)
        self.model, self.optimizer = self.strategy.prepare(model, optim.SGD(model.parameters(), lr=1.0))

    def write(self, all_write: threading.Barrier, over: threading.Event) -> None:
        steps = 0
        while not over.is_set():
            ids = torch.randint(ROWS, (300,)).unique()
            self.optimizer.zero_grad()
            (-self.model(ids)).sum().backward()
            self.optimizer.step()
            steps += 1
            if steps == 1:
                all_write.wait(PATIENCE)
        self.strategy.close()

    def read(self) -> None:
        ids = torch.randint(ROWS, (500,))
        rows = self.model(ids).detach() - ids[:, None] * APART
        assert (rows == rows[:, :1]).all(), "a row is of two versions"
        assert ((rows >= 0) & (rows < APART)).all(), "a row is another one"


@contextmanager
def written_to(cluster: LocalCluster, parts: int) -> Iterator[None]:
    """Other workers write meanwhile."""
    all_write, over = threading.Barrier(WRITERS + 1), threading.Event()
    with ThreadPoolExecutor(WRITERS) as pool:
        writing = [
            pool.submit(lambda task=f"worker:{index}": Player(cluster, task, parts).write(all_write, over))
            for index in range(WRITERS)
        ]
        try:
            all_write.wait(PATIENCE)
            yield
        finally:
            over.set()
        for each in writing:
            each.result(PATIENCE)


@pytest.mark.parametrize("falls_back", [False, True], ids=["", "no copy succeeds"])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("num_ps", [1, 2])
@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_rows(lane: str, num_ps: int, parts: int, falls_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if falls_back and lane == "tcp":
        pytest.skip("by TCP nothing is copied")
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    if falls_back:
        monkeypatch.setattr(SharedMemoryLane, "copy_rows", lambda *_: False)
    with LocalCluster(ps=num_ps, workers=WRITERS + 1) as cluster:
        reader = Player(cluster, "chief:0", parts)
        with written_to(cluster, parts):
            for _ in range(LOOKUPS):
                reader.read()
        reader.strategy.close()


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_many_rows_of_several_parts_do_not_block_both_ends(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More bytes each way than sockets hold: what a lane is asked comes before what it answers."""
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    monkeypatch.setattr(SharedMemoryLane, "copy_rows", lambda *_: False)
    rows = 400_000
    with LocalCluster(ps=1, workers=1) as cluster:
        strategy = ps.ParameterServerStrategy(
            cluster.resolver("chief:0"), variable_partitioner=ps.placement.FixedShards(3)
        )
        model = nn.Embedding(rows, 4, sparse=True)
        with torch.no_grad():
            model.weight.copy_(torch.arange(rows)[:, None].expand(rows, 4))
        model, _ = strategy.prepare(model, optim.SGD(model.parameters(), lr=1.0))
        ids = torch.arange(rows)
        assert torch.equal(model(ids)[:, 0], ids.float())
        strategy.close()
