"""Datasets of any kind, gone through once an epoch: this worker's share of them, from a position on.

Rules
    * A source takes every ``count``-th of the batches that its dataset gives, from the ``index``-th on: a *shard*.
    * A position is how many batches of the shard were taken. What comes before it is skipped without loading it where
      the dataset can be indexed, else it is drawn and dropped.
    * The dataset belongs to the caller, and is not changed; one with a state of its own is asked to load it.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from paramserver.distribute.input.loaders import PlacedSampler, rebuilt, shuffles
from paramserver.errors import ConfigError


class Shard(NamedTuple):
    """Which part of a dataset a worker reads: every ``count``-th, from the ``index``-th on."""

    index: int = 0
    count: int = 1

    def length(self, total: int) -> int:
        """How many of ``total`` there are in it.

        >>> Shard(0, 2).length(5), Shard(1, 2).length(5)
        (3, 2)
        """
        return len(range(self.index, total, self.count))


class Seed(NamedTuple):
    """What an order is drawn from, beside the epoch. Workers of the same ``stream`` draw the same."""

    value: int
    stream: int = 0


@runtime_checkable
class Stateful(Protocol):
    """A dataset that saves its own position, as torchdata's StatefulDataLoader and Hugging Face's streams do."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there with the next iteration."""


class Source(abc.ABC):
    """The share of a dataset that a worker reads."""

    @abc.abstractmethod
    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        """Its batches in an epoch, without the first ``skip``. Blocks as the dataset does."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Its batches in an epoch.

        Raises:
            TypeError: If the dataset does not know it.
        """

    @property
    def repeats(self) -> bool:
        """Whether an epoch that is gone through again has the same order, as far as one can tell."""
        return True

    def state(self) -> dict[str, Any] | None:
        """What the dataset itself says of where it is; None if it says nothing."""
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Let the dataset itself find the place where the next iteration goes on.

        Raises:
            ConfigError: If it cannot.
        """
        raise ConfigError(
            "load_state_dict: the state was saved for a dataset with a state of its own, and this one has none; "
            f"it must have state_dict() and load_state_dict(), as it had when {sorted(state)} were saved"
        )


def source_of(dataset: Any, shard: Shard = Shard(), seed: Seed | None = None) -> Source:  # noqa: B008  # immutable
    """What reads a dataset: a DataLoader, a Dataset or any other iterable of batches.

    Raises:
        ConfigError: If it is none of these, or shuffles in a way that cannot be sharded.
    """
    if isinstance(dataset, DataLoader) and not isinstance(dataset.dataset, IterableDataset):
        if type(dataset) is DataLoader:
            return LoaderSource(dataset, shard, seed)
        _check_order(dataset, shard)
    if not is_dataset(dataset):
        raise ConfigError(
            f"expected a DataLoader, a Dataset of batches or an iterable of batches, got a {type(dataset).__name__}"
        )
    if isinstance(dataset, Stateful):
        return StatefulSource(dataset, shard)
    return IndexedSource(dataset, shard) if is_indexed(dataset) else IterableSource(dataset, shard)


def is_dataset(value: object) -> bool:
    """Whether it can be read; a dict or a text is taken for a mistake.

    >>> is_dataset([1]), is_dataset("train.csv"), is_dataset(3)
    (True, False, False)
    """
    return not isinstance(value, (str, bytes, Mapping)) and (isinstance(value, Iterable) or is_indexed(value))


def is_indexed(value: object) -> bool:
    """Whether it is map-style: has a length, and an item for each index."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, Mapping)


def has_examples(dataset: object) -> bool:
    """Whether its items are examples and not batches: those of a map-style Dataset are, as far as one can tell."""
    return is_indexed(dataset) and not isinstance(dataset, Sequence)


class IterableSource(Source):
    """Reads whatever can be iterated over."""

    def __init__(self, dataset: Any, shard: Shard) -> None:
        self._dataset = dataset
        self._shard = shard

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        start, step = self._shard.index + skip * self._shard.count, self._shard.count
        batches = iter(self._dataset)
        return batches if (start, step) == (0, 1) else itertools.islice(batches, start, None, step)

    def __len__(self) -> int:
        return self._shard.length(len(self._dataset))

    @property
    def repeats(self) -> bool:
        return not (isinstance(self._dataset, DataLoader) and shuffles(self._dataset))


class IndexedSource(IterableSource):
    """Reads a map-style dataset, whose items are the batches."""

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        start, step = self._shard.index + skip * self._shard.count, self._shard.count
        if (start, step) == (0, 1) and isinstance(self._dataset, Iterable):
            return iter(self._dataset)  # may know a faster way than index by index
        return (self._dataset[index] for index in range(start, len(self._dataset), step))


class StatefulSource(IterableSource):
    """Reads a dataset that finds its own place again."""

    def __init__(self, dataset: Any, shard: Shard) -> None:
        super().__init__(dataset, shard)
        self._is_restored = False

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        if not self._is_restored:
            return super().begin(epoch, skip)
        self._is_restored = False  # it stands behind the last batch that was taken, so one round of others comes first
        return itertools.islice(iter(self._dataset), self._shard.count - 1, None, self._shard.count)

    @property
    def repeats(self) -> bool:
        return True

    def state(self) -> dict[str, Any]:
        return dict(self._dataset.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        self._dataset.load_state_dict(state)
        self._is_restored = True


class LoaderSource(Source):
    """Reads a torch DataLoader over a map-style dataset.

    As long as it is read from the start, whole and in torch's own order, the loader itself is iterated over; else one
    like it, whose sampler leaves out what is not wanted before it is loaded.
    """

    def __init__(self, loader: DataLoader[Any], shard: Shard, seed: Seed | None) -> None:
        self._loader = loader
        self._is_as_given = shard.count == 1 and seed is None
        self._sampler = PlacedSampler(loader, shard, seed)
        self._placed: DataLoader[Any] | None = None

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        if self._is_as_given and not skip:
            return iter(self._loader)
        if self._placed is None:
            self._placed = rebuilt(self._loader, self._sampler)  # kept, as its worker processes may be persistent
        self._sampler.place(epoch, skip)
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._loader) if self._is_as_given else len(self._sampler)

    @property
    def repeats(self) -> bool:
        return self._sampler.repeats


def _check_order(loader: DataLoader[Any], shard: Shard) -> None:
    if shard.count > 1 and shuffles(loader):
        raise ConfigError(
            f"sharding='static': all workers must see the same order, and that of a {type(loader).__name__} cannot be "
            "seeded; use torch's own DataLoader, or a sampler that reads the part which strategy.input_context names"
        )
