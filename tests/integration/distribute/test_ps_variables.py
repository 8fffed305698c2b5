"""ps.Variable on real ps tasks: several workers at once, waiting for the chief, restarts, checkpoints."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.patience import patience
from torch import nn

import paramserver as ps
from paramserver.checkpoint.model_dir import CheckpointManager
from paramserver.distribute.checkpoints import write_checkpoint
from paramserver.errors import DeadlineError, ModelMismatchError, RefusedError, RunOverError, UnavailableError
from paramserver.estimator.checkpoint import read_values
from paramserver.layout.blocks import BLOCK
from paramserver.layout.variables import VariableSpec
from paramserver.placement import FixedShards
from paramserver.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.usefixtures("each_strategy_is_a_process")

PATIENCE = patience(60.0)
Mode = ps.VariableAggregation


@pytest.fixture
def cluster(lane: str) -> Iterator[LocalCluster]:
    with LocalCluster(ps=2, workers=3, lane=lane) as cluster:
        yield cluster


@pytest.fixture
def start(cluster: LocalCluster) -> Iterator[Callable[..., ps.ParameterServerStrategy]]:
    """Starts a strategy of a task of the cluster."""
    started = []

    def start(task: str = "chief:0", **options: Any) -> ps.ParameterServerStrategy:
        started.append(ps.ParameterServerStrategy(cluster.resolver(task), **options))
        return started[-1]

    yield start
    for strategy in started:
        if strategy.client is not None:
            strategy.client.close()


def together(*works: Callable[[], Any]) -> list[Any]:
    """What functions return that run at once, each on a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(work) for work in works]]


def create(strategy: ps.ParameterServerStrategy, *args: Any, **kwargs: Any) -> Any:
    with strategy.scope():
        return ps.Variable(*args, **kwargs)


# --- creation


def test_w02_workers_share_what_the_chief_creates(start: Any) -> None:
    """The chief's value is everyone's, on the ps that everyone finds by the same order of creation."""

    def work(task: str, initial: float) -> tuple[str, str, float]:
        strategy = start(task)
        create(strategy, 0)
        variable = create(strategy, initial, name="w")
        return variable.name, variable.device, float(variable)

    tasks = ("worker:1", "worker:0", "chief:0")
    found = together(*(functools.partial(work, task, float(index)) for index, task in enumerate(tasks)))
    assert found == [("w", "/job:ps/task:1/device:CPU:0", 2.0)] * 3


def test_it_works_before_and_after_prepare(start: Any) -> None:
    """Both share the turns of ps tasks, and neither moves what the model finds by its index."""

    def work(task: str) -> list[float]:
        strategy = start(task)
        before = create(strategy, 1.0, name="before")
        model = nn.Linear(2, 1)
        model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        after = create(strategy, 2.0, name="after")
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return [float(before), float(after), before.ps, after.ps]

    assert together(*(functools.partial(work, task) for task in ("chief:0", "worker:0"))) == [[1, 2, 0, 1]] * 2


def test_who_waits_for_a_chief_that_does_not_create_is_told(start: Any, cluster: LocalCluster) -> None:
    """W08, with the variable and the ps."""
    worker = start("worker:0", session_creation_timeout=0.2)
    with pytest.raises(DeadlineError, match=r"the chief has not created variable 'w' on ps:0 within 0.2 s"):
        create(worker, 0, name="w")


def test_who_waits_for_a_chief_that_has_finished_is_told(start: Any) -> None:
    chief, worker = start(), start("worker:0")
    worker.connect()
    chief.connect().goodbye()
    with pytest.raises(RunOverError, match="chief:0 has finished"):
        create(worker, 0)


def test_who_waits_for_a_chief_that_fails_is_told(start: Any) -> None:
    chief, worker = start(), start("worker:0")
    worker.connect()
    chief.connect().goodbye("ValueError: no data")
    with pytest.raises(RefusedError, match="chief:0 failed.*no data"):
        create(worker, 0)


@pytest.mark.parametrize("initial", [[1.0, 2.0], 1])
def test_another_shape_or_dtype_than_the_chiefs_is_refused(start: Any, initial: Any) -> None:
    """For a worker, and for a chief that starts again with another program."""
    create(start(), 1.0, name="w")
    for task in ("worker:0", "chief:0"):
        with pytest.raises(ModelMismatchError, match=r"'w' on ps:0 is float32\[\]") as caught:
            create(start(task), initial, name="w")
        assert (caught.value.variable, caught.value.task) == ("w", "ps:0")


def test_a_chief_that_starts_again_finds_the_present_value(start: Any) -> None:
    """It keeps what was trained, and workers go on; the new incarnation's assignments count from one again."""
    first = create(start(), 1.0, name="w", aggregation=Mode.SUM)
    worker = create(start("worker:0"), 1.0, name="w")
    for _ in range(3):
        first.assign_add(1)
    first.strategy.client.close()
    again = create(start(), 1.0, name="w")
    assert float(again) == float(worker) == 4
    assert again.assign_add(1).item() == worker.assign_add(0).item() == 5


def test_what_no_ps_can_hold_leaves_the_chief_able_to_go_on(start: Any) -> None:
    strategy = start()
    with pytest.raises(ValueError, match="complex64"):
        create(strategy, 1j)
    assert float(create(strategy, 1.0)) == 1


# --- values


def test_large_values_go_block_by_block(start: Any) -> None:
    values = torch.arange(2.0 * BLOCK + 7)
    chief, worker = (create(start(task), values, name="large") for task in ("chief:0", "worker:0"))
    assert torch.equal(worker.value(), values)
    assert torch.equal(worker.assign_add(values), 2 * values)
    assert torch.equal(chief.value(), 2 * values)


def test_a_variable_of_no_elements_is_one(start: Any) -> None:
    chief, worker = (create(start(task), torch.empty(0, 3)) for task in ("chief:0", "worker:0"))
    assert worker.value().shape == chief.assign_add(torch.empty(0, 3)).shape == (0, 3)


def test_a_ps_that_is_lost_is_named(start: Any, cluster: LocalCluster) -> None:
    strategy = start()
    first, second = create(strategy, 0), create(strategy, 0)
    cluster.servers[1].stop()
    with pytest.raises(UnavailableError, match="ps:1"):
        second.assign_add(1)
    assert first.assign_add(1).item() == 1


def test_eight_workers_lose_no_assignment(lane: str) -> None:
    """W09: each adds 1,000 times, at the same time, and reads its own result."""
    spec = VariableSpec("counter", (3,), "int64")
    with LocalCluster(ps=1, workers=8, lane=lane) as cluster:
        clients = [cluster.client(task) for task in cluster.tasks]
        clients[0].variables.create(0, spec, torch.zeros(3, dtype=torch.int64))
        ready, ones = threading.Barrier(len(clients)), torch.ones(3, dtype=torch.int64)

        def work(client: Any) -> list[int]:
            ready.wait(PATIENCE)
            return [client.variables.update(0, spec, "add", ones)[0].item() for _ in range(1000)]

        seen = together(*(functools.partial(work, client) for client in clients))
        assert clients[0].variables.read(0, spec, (0, 3)).tolist() == [8000] * 3
    assert sorted(value for results in seen for value in results) == list(range(1, 8001)), "each update has its own"


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_w04_workers_and_replicas_are_counted(workers: int, replicas: int) -> None:
    """SUM counts every replica of every worker, ONLY_FIRST_REPLICA every worker (W05); also by parts (P08)."""

    def work(task: Any) -> None:
        devices = [f"cpu:{index}" for index in range(replicas)]
        strategy = ps.ParameterServerStrategy(
            cluster.resolver(task), compute_devices=devices, variable_partitioner=FixedShards(2)
        )
        with strategy.scope():
            each = ps.Variable(0, name="each", aggregation=Mode.SUM)
            once = ps.Variable(0, name="once", aggregation=Mode.ONLY_FIRST_REPLICA)
            parts = ps.Variable(torch.zeros(3, 2), name="parts", aggregation=Mode.SUM)
            strategy.run(lambda: [each.assign_add(1), once.assign_add(1), parts.assign_add(1)])
        results.append([each, once, parts, strategy])

    results: list[list[Any]] = []
    with LocalCluster(ps=2, workers=workers) as cluster:
        together(*(functools.partial(work, task) for task in cluster.tasks))
        for each, once, parts, _ in results:
            assert (int(each), int(once)) == (workers * replicas, workers)
            assert parts.value().unique().tolist() == [workers * replicas]
        for *_, strategy in results:
            strategy.close()


# --- checkpoints


def alone(replicas: int, value: float) -> tuple[Any, list[Any]]:
    """The client and the variables of a run of one process; the second one is partitioned."""
    devices = [f"cpu:{index}" for index in range(replicas)]
    strategy = ps.ParameterServerStrategy(compute_devices=devices, variable_partitioner=FixedShards(replicas))
    whole = create(strategy, int(value), name="whole", aggregation=Mode.SUM)
    return strategy.connect(), [whole, create(strategy, torch.full((3, 2), value), name="rows", aggregation=Mode.SUM)]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a12_checkpoints_go_between_one_replica_and_several(tmp_path: Path, before: int, after: int) -> None:
    """B06: and between one part and several."""
    client, _ = alone(before, 3.0)
    path = write_checkpoint(client, CheckpointManager(str(tmp_path)), 0, {})
    assert {name: value.tolist() for name, value in read_values(path).items()} == {"whole": 3, "rows": [[3.0] * 2] * 3}
    client, (whole, rows) = alone(after, 0.0)
    client.restore(path)
    assert int(whole) == 3
    assert torch.equal(rows.value(), torch.full((3, 2), 3.0))
