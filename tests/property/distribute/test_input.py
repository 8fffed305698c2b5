"""What holds for all sizes: nothing is read twice, nothing is lost, and a restart changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from paramserver.distribute.core.values import PerReplica
from paramserver.distribute.input.dataset import DistributedDataset
from paramserver.distribute.input.dealing import dealing_to
from paramserver.distribute.input.share import Seed, Share
from paramserver.distribute.input.sources import source_of

lengths = st.integers(0, 40)
counts = st.integers(1, 5)
batch_sizes = st.integers(1, 7)


class Streamed(IterableDataset[int]):
    """Numbers, one after the other."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def loader(length: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(range(length), batch_size, shuffle=length > 0)  # type: ignore[arg-type]


makers: st.SearchStrategy[Callable[[int, int], Any]] = st.sampled_from(
    [
        loader,
        lambda length, batch_size: DataLoader(range(length), batch_size, drop_last=True),  # type: ignore[arg-type]
        lambda length, batch_size: DataLoader(range(length), batch_size=None, shuffle=length > 0),  # type: ignore[arg-type]
        lambda length, batch_size: DataLoader(Streamed(length), batch_size),
        lambda length, _: list(range(length)),
        lambda length, _: Streamed(length),
    ]
)


def flat(batches: Any) -> list[int]:
    return [int(number) for batch in batches for number in torch.as_tensor(batch).flatten()]


@given(lengths, st.integers(2, 6))
def test_the_parts_of_a_batch_make_it_up_and_differ_by_a_row_at_most(rows: int, replicas: int) -> None:
    """I07: in order, the first ones bigger."""
    dealt = list(dealing_to([None] * replicas, is_global=True).deal(iter([torch.arange(rows)])))
    if rows < replicas:
        assert not dealt
        return
    sizes = [len(part) for part in dealt[0].values]
    assert torch.cat(dealt[0].values).tolist() == list(range(rows))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(lengths, st.integers(2, 6))
def test_groups_are_what_goes_round(elements: int, replicas: int) -> None:
    """I04, I06."""
    dealing = dealing_to([None] * replicas, is_global=False)
    groups = [group.values for group in dealing.deal(iter(range(elements)))]
    assert list(itertools.chain(*groups)) == list(range(elements - elements % replicas))
    assert dealing.length(elements) == len(groups)


@given(lengths, batch_sizes, counts, st.integers(0, 3), st.integers(0, 2**40))
def test_the_shares_of_all_workers_are_the_dataset(length: int, size: int, count: int, epoch: int, seed: int) -> None:
    """I08: every example once, and about as many for each worker."""
    sources = [source_of(loader(length, size), Share(index, count), Seed(seed)) for index in range(count)]
    shares = [flat(source.begin(epoch, 0)) for source in sources]
    assert sorted(itertools.chain(*shares)) == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(makers, lengths, batch_sizes, counts, st.data())
def test_a_restart_anywhere_changes_nothing(
    make: Callable[[int, int], Any], length: int, size: int, count: int, data: st.DataObject
) -> None:
    share = Share(data.draw(st.integers(0, count - 1)), count)
    replicas = data.draw(st.integers(1, 3))

    def begun() -> DistributedDataset[Any]:
        dealing = dealing_to([None] * replicas, is_global=False)
        return DistributedDataset(source_of(make(length, size), share, Seed(1)), dealing)

    first = begun()
    went = []
    for epoch in range(2):
        went += [(epoch, shown(element), first.state_dict()) for element in first]
    for place, (_, _, state) in enumerate(went):
        second = begun()
        second.load_state_dict(state)
        left = [(epoch, shown(element)) for epoch in range(second.epoch, 2) for element in second]
        assert left == [(epoch, element) for epoch, element, _ in went[place + 1 :]]


@given(makers, lengths, batch_sizes, counts, st.integers(0, 4))
def test_a_share_is_as_long_as_it_says(
    make: Callable[[int, int], Any], length: int, size: int, count: int, index: int
) -> None:
    dataset = make(length, size)
    source = source_of(dataset, Share(index % count, count), Seed(1))
    if not isinstance(dataset, Streamed) and not isinstance(getattr(dataset, "dataset", None), Streamed):
        assert len(source) == len(list(source.begin(0, 0)))


def shown(element: Any) -> list[int]:
    return flat(element.values if isinstance(element, PerReplica) else [element])
