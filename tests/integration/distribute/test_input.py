"""Input through the worker processes of a DataLoader."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import paramserver as ps


class Numbers(Dataset[Any]):
    """A number, and the process that has loaded it."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, os.getpid()])


class Streamed(IterableDataset[int]):
    """Numbers, dealt to the processes of the loader."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(info.id, 24, info.num_workers) if info else range(24))


def worker(index: int, count: int = 2) -> ps.ParameterServerStrategy:
    cluster = ps.ClusterSpec({"worker": [f"w{each}:1" for each in range(count)], "ps": ["p:1"]})
    return ps.ParameterServerStrategy(ps.SimpleClusterResolver(cluster, task_type="worker", task_id=index))


def loader(dataset: Any = None, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset or Numbers(), batch_size=4, num_workers=2, **settings)


@pytest.mark.parametrize("options", [None, ps.InputOptions(sharding="static")], ids=["whole", "static"])
def test_batches_are_loaded_by_the_processes_of_the_loader(options: ps.InputOptions | None) -> None:
    """I07, I08: workers of a loader are kept; both processes load, and this one does not."""
    batches = list(worker(1).distribute_dataset(loader(), options))
    loaders = {int(row[1]) for batch in batches for row in batch}
    assert len(loaders) == 2
    assert os.getpid() not in loaders
    expected = list(range(1, 24, 2)) if options else list(range(24))
    assert [int(row[0]) for batch in batches for row in batch] == expected


def test_processes_that_persist_serve_all_epochs_of_a_share() -> None:
    """I08, I04."""
    options = ps.InputOptions(sharding="static", seed=3)
    shares = [
        worker(index).distribute_dataset(loader(shuffle=True, persistent_workers=True), options) for index in range(2)
    ]
    epochs = [[list(share) for share in shares] for _ in range(2)]
    numbers = [[int(row[0]) for batch in itertools.chain(*epoch) for row in batch] for epoch in epochs]
    assert sorted(numbers[0]) == sorted(numbers[1]) == list(range(24))
    assert numbers[0] != numbers[1]
    processes = [{int(row[1]) for batch in itertools.chain(*epoch) for row in batch} for epoch in epochs]
    assert processes[0] == processes[1]


@pytest.mark.parametrize("dataset", [Numbers(), Streamed()], ids=["map-style", "stream"])
@pytest.mark.parametrize("sharding", ["none", "static"])
def test_a_restarted_worker_goes_on_although_its_loader_had_read_ahead(dataset: Any, sharding: str) -> None:
    """What was loaded ahead and not taken is not skipped."""
    options = ps.InputOptions(sharding=sharding, seed=1)

    def batches() -> Any:
        shuffle = isinstance(dataset, Numbers) or None
        return worker(0).distribute_dataset(loader(dataset, shuffle=shuffle), options)

    def numbers(elements: Any) -> list[list[int]]:
        return [batch.reshape(len(batch), -1)[:, 0].tolist() for batch in elements]

    whole = batches()
    expected = [numbers(whole) for _ in range(2)]
    first = batches()
    iterator = iter(first)
    assert numbers(itertools.islice(iterator, 2)) == expected[0][:2]
    state = first.state_dict()
    assert state == {"epoch": 0, "batches": 2}
    del iterator  # the process is gone
    second = batches()
    second.load_state_dict(state)
    assert [numbers(second) for _ in range(second.epoch, 2)] == [expected[0][2:], expected[1]]


def test_replicas_share_what_processes_load() -> None:
    """I07, E17."""
    own = ps.CentralStorageStrategy(["cpu:0", "cpu:1"])
    iterator = own.make_dataset_iterator(loader(Streamed()))
    sums = [own.reduce("sum", own.run(lambda x: x.sum(), (batch,))).item() for batch in iterator]
    assert len(sums) == 6
    assert sum(sums) == sum(range(24))
    iterator.initialize()
    assert len(list(iterator)) == 6


def test_an_iteration_that_is_left_early_leaves_no_process() -> None:
    """The check after each test would find it."""
    distributed = worker(0).distribute_dataset(loader())
    for _ in distributed:
        break
    iterator = worker(0).make_dataset_iterator(loader())
    iterator.get_next()
    iterator.initialize()


def test_rows_of_arrays_are_loaded_by_processes() -> None:
    """I15."""
    own = worker(0)
    data = own.make_numpy_dataset({"x": torch.arange(24).numpy()})
    assert [batch["x"].tolist() for batch in own.distribute_dataset(loader(data))] == [
        list(range(first, first + 4)) for first in range(0, 24, 4)
    ]
