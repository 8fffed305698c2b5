"""Shares of a dataset, orders that come again, and going on where an iteration was."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import paramserver as ps
from paramserver.distribute.input.dataset import DistributedDataset
from paramserver.distribute.input.loaders import rebuilt

STATIC = ps.InputOptions(sharding="static")
SEEDED = ps.InputOptions(seed=5)


class Counted(Dataset[int]):
    """Numbers, and which of them were loaded."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Streamed(IterableDataset[int]):
    """Numbers, one after the other."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.drawn = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.drawn += 1
            yield number


class Resumable:
    """A stream of batches with a state of its own, as torchdata's StatefulDataLoader has it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.at = self.start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        for number in range(start, self.length):
            self.at = number + 1
            yield number

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict["at"]


class OwnLoader(DataLoader[Any]):
    """Somebody's kind of DataLoader."""


def worker(index: int, count: int = 3, **settings: Any) -> ps.ParameterServerStrategy:
    cluster = ps.ClusterSpec({"worker": [f"w{each}:1" for each in range(count)], "ps": ["p:1"]})
    resolver = ps.SimpleClusterResolver(cluster, task_type="worker", task_id=index)
    return ps.ParameterServerStrategy(resolver, **settings)


def read(batches: Iterable[Any]) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in batches]


def loader(data: Any = None, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Counted(10) if data is None else data, **{"batch_size": 2, **settings})


def flat(batches: Iterable[Any]) -> list[int]:
    return [int(number) for batch in batches for number in torch.as_tensor(batch).flatten()]


def of_all(dataset: Any, options: ps.InputOptions = STATIC, count: int = 3) -> list[list[Any]]:
    """What each of the workers reads in an epoch."""
    return [read(worker(index, count).distribute_dataset(dataset, options)) for index in range(count)]


# --- sharding


def test_a_loader_over_a_map_style_dataset_is_sharded_by_examples() -> None:
    """I08: and nobody loads what is another worker's."""
    data = Counted(10)
    assert read(worker(1).distribute_dataset(loader(data), STATIC)) == [[1, 4], [7]]
    assert data.loaded == [1, 4, 7]
    assert of_all(loader()) == [[[0, 3], [6, 9]], [[1, 4], [7]], [[2, 5], [8]]]


def test_a_share_has_a_length() -> None:
    for index, (length, dropping, items) in enumerate([(2, 2, 4), (2, 1, 3), (2, 1, 3)]):
        own = worker(index)
        assert len(own.distribute_dataset(loader(), STATIC)) == length
        assert len(own.distribute_dataset(loader(drop_last=True), STATIC)) == dropping
        assert len(own.distribute_dataset(loader(batch_size=None), STATIC)) == items
        assert len(own.distribute_dataset(list(range(10)), STATIC)) == items


@pytest.mark.parametrize(
    "dataset",
    [
        list(range(10)),
        Counted(10),
        Streamed(10),
        Resumable(10),
        loader(Streamed(10), batch_size=None),
        loader(batch_size=None),
    ],
    ids=["list", "Dataset", "IterableDataset", "with a state", "loader of a stream", "loader without batches"],
)
def test_anything_else_is_sharded_by_batches(dataset: Any) -> None:
    """I08."""
    assert of_all(dataset) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_whole_batches_that_the_program_samples_are_sharded_whole() -> None:
    sampled = DataLoader(Counted(10), batch_sampler=[[0, 9], [1, 8, 3], [2], [7]])
    assert of_all(sampled) == [[[0, 9], [7]], [[1, 8, 3]], [[2]]]


def test_a_batch_sampler_of_torch_is_taken_for_what_it_is() -> None:
    sampled = DataLoader(Counted(10), batch_sampler=BatchSampler(range(10), batch_size=2, drop_last=True))
    assert of_all(sampled) == [[[0, 3], [6, 9]], [[1, 4]], [[2, 5]]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shuffle": True}, range(10)),
        ({"shuffle": True, "generator": torch.Generator()}, range(10)),
        ({"sampler": SubsetRandomSampler(range(5, 9))}, range(5, 9)),
        ({"batch_size": 1, "batch_sampler": BatchSampler(RandomSampler(range(10)), 2, False)}, range(10)),
        ({"batch_size": None, "shuffle": True}, range(10)),
    ],
    ids=["shuffle", "generator", "subset", "batch sampler", "items"],
)
def test_workers_that_shuffle_shuffle_alike_so_that_each_example_is_read_once(
    settings: dict[str, Any], expected: Iterable[int]
) -> None:
    """I08: without a seed too; each epoch in another order."""
    shares = [worker(index).distribute_dataset(loader(**settings), STATIC) for index in range(3)]
    epochs = [[flat(share) for share in shares] for _ in range(2)]
    assert [sorted(itertools.chain(*epoch)) for epoch in epochs] == [list(expected)] * 2
    assert epochs[0] != epochs[1]


def test_a_sampler_with_replacement_is_sharded_too() -> None:
    sampler = WeightedRandomSampler([1.0] * 10, num_samples=12)
    shares = of_all(loader(sampler=sampler))
    assert [sum(map(len, share)) for share in shares] == [4, 4, 4]
    assert shares == of_all(loader(sampler=sampler))


def test_one_worker_alone_reads_everything() -> None:
    own = ps.ParameterServerStrategy().distribute_dataset(loader(), STATIC)
    assert read(own) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_share_is_said_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="paramserver.distribute.input"):
        worker(1).distribute_dataset([1], STATIC)
    assert caplog.messages == ["input pipeline 1 of 3: this worker reads a part of the dataset of its own"]


@pytest.mark.parametrize(
    "dataset",
    [
        OwnLoader(Counted(4), shuffle=True),
        DataLoader(Counted(4), batch_sampler=type("Own", (BatchSampler,), {})(RandomSampler(Counted(4)), 2, False)),
    ],
    ids=["loader", "batch sampler"],
)
def test_an_order_that_cannot_be_seeded_cannot_be_sharded(dataset: DataLoader[Any]) -> None:
    with pytest.raises(ValueError, match="all workers must see the same order, and the random one of this"):
        worker(0).distribute_dataset(dataset, STATIC)
    assert len(read(worker(0).distribute_dataset(dataset))) == len(dataset)


def test_a_loader_of_another_kind_is_sharded_by_batches() -> None:
    assert of_all(OwnLoader(Counted(10), batch_size=2)) == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5]]]


def test_several_replicas_divide_the_batches_of_a_share() -> None:
    """I07, I08."""
    own = worker(1, count=2, compute_devices=["cpu:0", "cpu:1"])
    shared = own.distribute_dataset(loader(Counted(8), batch_size=4), STATIC)
    assert [[part.tolist() for part in batch.values] for batch in shared] == [[[1, 3], [5, 7]]]


# --- what the caller passes in


def test_a_loader_without_options_is_the_one_that_is_iterated_over() -> None:
    given = loader(shuffle=True)
    torch.manual_seed(3)
    expected = read(given)
    torch.manual_seed(3)
    assert read(worker(0).distribute_dataset(given)) == expected


def test_settings_of_a_loader_are_kept() -> None:
    settings: dict[str, Any] = {
        "num_workers": 2,
        "collate_fn": list,
        "pin_memory": True,
        "timeout": 3.0,
        "worker_init_fn": print,
        "multiprocessing_context": "fork",
        "generator": torch.Generator(),
        "prefetch_factor": 4,
        "persistent_workers": True,
        "in_order": False,
    }
    given = loader(**settings)
    made = rebuilt(given, given.batch_sampler)
    assert made.dataset is given.dataset
    assert made.batch_sampler is given.batch_sampler
    for name in settings:
        assert getattr(made, name) is getattr(given, name), name
    unbatched = loader(batch_size=None, collate_fn=list)
    assert rebuilt(unbatched, unbatched.sampler).batch_sampler is None


def test_nothing_that_is_passed_in_is_changed() -> None:
    given = loader(shuffle=True, generator=torch.Generator().manual_seed(1))
    before = copy.copy(vars(given))
    distributed = worker(1).distribute_dataset(given, STATIC)
    distributed.load_state_dict({"epoch": 1, "batches": 1})
    assert read(distributed)
    assert vars(given) == before
    assert given.sampler.generator is given.generator  # type: ignore[union-attr]  # a RandomSampler
    assert given.batch_sampler.sampler is given.sampler  # type: ignore[union-attr]


# --- seeds


def test_a_seed_gives_every_epoch_and_worker_an_order_that_comes_again() -> None:
    """I08: each worker has its own order."""

    def orders(options: ps.InputOptions, index: int) -> list[list[int]]:
        distributed = worker(index).distribute_dataset(loader(shuffle=True), options)
        return [flat(distributed) for _ in range(2)]

    first, again, other_worker = orders(SEEDED, 0), orders(SEEDED, 0), orders(SEEDED, 1)
    assert first == again
    assert len({*map(tuple, first), *map(tuple, other_worker), *map(tuple, orders(ps.InputOptions(seed=6), 0))}) == 6
    assert all(sorted(order) == list(range(10)) for order in first + other_worker)


def test_a_seed_leaves_an_order_that_is_not_random_alone() -> None:
    data = Counted(10)
    assert read(worker(0).distribute_dataset(loader(data), SEEDED)) == read(loader(data))


# --- state


def interrupted(make: Any, after: int, epochs: int = 3) -> tuple[list[Any], list[Any], DistributedDataset[Any]]:
    """What is left after a restart, what was left without one, and the dataset that went on."""
    first = make()
    left: list[Any] = []
    state = json.dumps(first.state_dict())
    taken = 0
    for _ in range(epochs):
        for batch in first:
            if taken < after:
                taken += 1
                state = json.dumps(first.state_dict())
            else:
                left.append(batch)
    second = make()
    second.load_state_dict(json.loads(state))
    went_on = [batch for _ in range(second.epoch, epochs) for batch in second]
    return read(went_on), read(left), second


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("options", [ps.InputOptions(), STATIC, SEEDED], ids=["whole", "static", "seeded"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: loader(),
        lambda: loader(batch_size=None),
        lambda: list(range(5)),
        lambda: Counted(5),
        lambda: Streamed(5),
        lambda: Resumable(5),
        lambda: loader(Streamed(10)),
    ],
    ids=["loader", "items", "list", "Dataset", "IterableDataset", "with a state", "loader of a stream"],
)
def test_a_restarted_worker_goes_on_where_its_epoch_was(make: Any, options: ps.InputOptions, after: int) -> None:
    went_on, left, _ = interrupted(lambda: worker(1).distribute_dataset(make(), options), after)
    assert went_on == left


@pytest.mark.parametrize("after", [0, 1, 4, 5, 7])
@pytest.mark.parametrize("sharding", ["none", "static"])
def test_a_loader_that_shuffles_goes_on_if_it_is_seeded(sharding: str, after: int) -> None:
    options = ps.InputOptions(seed=2, sharding=sharding)
    went_on, left, _ = interrupted(lambda: worker(1).distribute_dataset(loader(shuffle=True), options), after)
    assert went_on == left


def test_what_was_taken_is_not_loaded_again() -> None:
    data = Counted(10)
    distributed = worker(0).distribute_dataset(loader(data))
    distributed.load_state_dict({"epoch": 2, "batches": 3})
    assert read(distributed) == [[6, 7], [8, 9]]
    assert data.loaded == [6, 7, 8, 9]
    assert read(distributed) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert distributed.state_dict() == {"epoch": 4, "batches": 0}
    assert repr(distributed) == "<DistributedDataset in epoch 4, 0 batches taken>"


def test_batches_count_as_the_dataset_gives_them_also_where_they_are_divided_or_left_out() -> None:
    own = ps.CentralStorageStrategy(["cpu:0", "cpu:1"])

    def make() -> DistributedDataset[Any]:
        return own.distribute_dataset([torch.arange(1), torch.arange(2), torch.arange(4)])

    distributed = make()
    assert [part.tolist() for part in next(iter(distributed)).values] == [[0], [1]]
    assert distributed.state_dict() == {"epoch": 0, "batches": 2}
    restarted = make()
    restarted.load_state_dict(distributed.state_dict())
    assert [[part.tolist() for part in batch.values] for batch in restarted] == [[[0, 1], [2, 3]]]


def test_batches_of_a_function_count_by_groups() -> None:
    own = ps.CentralStorageStrategy(["cpu:0", "cpu:1"])
    distributed = own.distribute_datasets_from_function(lambda _: range(7))
    iterator = iter(distributed)
    next(iterator)
    assert distributed.state_dict() == {"epoch": 0, "batches": 2}
    distributed.load_state_dict({"epoch": 0, "batches": 4})
    assert [group.values for group in distributed] == [(4, 5)]


@pytest.mark.parametrize(
    "given",
    [loader(shuffle=True), loader(shuffle=True, generator=torch.Generator()), OwnLoader(Counted(10), shuffle=True)],
    ids=["shuffle", "generator", "loader of another kind"],
)
def test_an_order_that_does_not_come_again_begins_anew_and_a_line_says_so(
    given: DataLoader[Any], caplog: pytest.LogCaptureFixture
) -> None:
    distributed = worker(0).distribute_dataset(given)
    distributed.load_state_dict({"epoch": 1, "batches": 2})
    assert "epoch 1 starts from its beginning, although 2 of its batches were taken before" in caplog.messages[-1]
    assert "InputOptions(seed=...)" in caplog.messages[-1]
    assert len(read(distributed)) == len(given)
    assert distributed.epoch == 2


def test_a_sampler_with_epochs_of_its_own_goes_on() -> None:
    def make() -> DistributedDataset[Any]:
        return worker(0).distribute_dataset(loader(sampler=DistributedSampler(Counted(10), num_replicas=1, rank=0)))

    went_on, left, _ = interrupted(make, 2, epochs=1)
    assert went_on == left


def test_a_dataset_with_a_state_keeps_it_in_ours_in_the_middle_of_an_epoch() -> None:
    distributed = worker(0).distribute_dataset(Resumable(3))
    assert distributed.state_dict() == {"epoch": 0, "batches": 0}
    next(iter(distributed))
    assert distributed.state_dict() == {"epoch": 0, "batches": 1, "dataset": {"at": 1}}
    with pytest.raises(ValueError, match="the state was saved for a dataset with a state of its own"):
        worker(0).distribute_dataset([1]).load_state_dict(distributed.state_dict())


def test_a_dataset_with_a_state_and_epochs_is_told_the_epoch() -> None:
    """As Hugging Face's streams, it goes back to a loaded state in every iteration of the epoch of that state."""

    class Stream(Resumable):
        epoch = loaded = 0

        def __iter__(self) -> Iterator[int]:
            self.start = self.loaded if self.epoch == 1 else 0
            return super().__iter__()

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.loaded = state_dict["at"]

    distributed = worker(0).distribute_dataset(Stream(3))
    distributed.load_state_dict({"epoch": 1, "batches": 2, "dataset": {"at": 2}})
    assert [list(distributed) for _ in range(2)] == [[2], [0, 1, 2]]


def test_epochs_count_iterations_also_those_that_were_left_early() -> None:
    distributed = worker(0).distribute_dataset([1, 2])
    assert distributed.epoch == 0
    next(iter(distributed))
    next(iter(distributed))
    assert distributed.state_dict() == {"epoch": 1, "batches": 1}
    assert list(distributed) == [1, 2]
    assert distributed.state_dict() == {"epoch": 3, "batches": 0}


def test_an_iteration_that_a_later_one_has_replaced_counts_no_more() -> None:
    distributed = worker(0).distribute_dataset([1, 2])
    early, late = iter(distributed), iter(distributed)
    assert list(early) == [1, 2]
    assert distributed.state_dict() == {"epoch": 1, "batches": 0}
    assert next(late) == 1
    assert distributed.state_dict() == {"epoch": 1, "batches": 1}


@pytest.mark.parametrize(
    "state",
    [None, {}, {"epoch": 1}, {"epoch": -1, "batches": 0}, {"epoch": 0, "batches": 1.0}, {"epoch": True, "batches": 0}],
)
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"load_state_dict: expected what state_dict\(\) returned"):
        worker(0).distribute_dataset([1]).load_state_dict(state)
