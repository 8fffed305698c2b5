"""Datasets of any kind, read once an epoch: this worker's share of them, from a position on.

Rules
    * A source takes every ``count``-th batch of its dataset, starting with the ``index``-th: a *share*.
    * A position is the number of batches of the share that were taken. Earlier batches are skipped without loading if
      the dataset can be indexed; otherwise they are drawn and dropped.
    * The dataset belongs to the caller and is not changed, except that a dataset with a state of its own is asked to
      load it, and is told the epoch if it has ``set_epoch``.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from paramserver.distribute.input.loaders import PlacedSampler, can_seed, rebuilt, shuffles
from paramserver.distribute.input.share import WHOLE, Seed, Share
from paramserver.errors import ConfigError


@runtime_checkable
class Stateful(Protocol):
    """A dataset that saves its own position, as torchdata's StatefulDataLoader and Hugging Face's streams do."""

    def state_dict(self) -> dict[str, Any]:
        """Return the dataset's position."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at this position with the next iteration."""


class Source(abc.ABC):
    """The share of a dataset that a worker reads."""

    @abc.abstractmethod
    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        """Return the share's batches in an epoch, without the first ``skip``. Blocks as the dataset does."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of the share's batches in an epoch.

        Raises:
            TypeError: If the dataset does not know its length.
        """

    @property
    def repeats(self) -> bool:
        """Whether an epoch that is repeated has the same order, as far as one can tell."""
        return True

    def state(self) -> dict[str, Any] | None:
        """Return the dataset's own state of its position; None if it has none."""
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Have the dataset itself find the position of the next iteration.

        Raises:
            ConfigError: If it has no state of its own.
        """
        raise ConfigError(
            "load_state_dict: the state was saved for a dataset with a state of its own, and this one has none; "
            f"it must have state_dict() and load_state_dict(), as it had when {sorted(state)} were saved"
        )


def source_of(dataset: Any, share: Share = WHOLE, seed: Seed | None = None) -> Source:
    """Return the source for a dataset: a DataLoader, a Dataset or any other iterable of batches.

    Raises:
        ConfigError: If the dataset has another type, or shuffles in a way that cannot be sharded.
    """
    if isinstance(dataset, DataLoader):
        _check_order(dataset, share)
        if type(dataset) is DataLoader and not isinstance(dataset.dataset, IterableDataset):
            return LoaderSource(dataset, share, seed)
    if not is_dataset(dataset):
        raise ConfigError(
            "the dataset to distribute: expected a DataLoader, a Dataset of batches or an iterable of batches, got a "
            f"{type(dataset).__name__}"
        )
    if isinstance(dataset, Stateful):
        return StatefulSource(dataset, share)
    return IndexedSource(dataset, share) if is_indexed(dataset) else IterableSource(dataset, share)


def is_dataset(value: object) -> bool:
    """Return whether a value can be read as a dataset; a dict or a text is regarded as a mistake.

    >>> is_dataset([1]), is_dataset("train.csv"), is_dataset(3)
    (True, False, False)
    """
    return not isinstance(value, (str, bytes, Mapping)) and (isinstance(value, Iterable) or is_indexed(value))


def is_indexed(value: object) -> bool:
    """Return whether a value is map-style: has a length, and an item for each index."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, Mapping)


def has_examples(dataset: object) -> bool:
    """Return whether a dataset's items are examples and not batches: so with map-style Datasets, by assumption."""
    return is_indexed(dataset) and not isinstance(dataset, Sequence)


class IterableSource(Source):
    """A source for any iterable."""

    def __init__(self, dataset: Any, share: Share) -> None:
        self._dataset = dataset
        self._share = share

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        start, step = self._share.start(skip), self._share.count
        batches = iter(self._dataset)
        return batches if (start, step) == (0, 1) else itertools.islice(batches, start, None, step)

    def __len__(self) -> int:
        return self._share.length(len(self._dataset))

    @property
    def repeats(self) -> bool:
        return not (isinstance(self._dataset, DataLoader) and shuffles(self._dataset))


class IndexedSource(IterableSource):
    """A source for a map-style dataset whose items are the batches."""

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        start, step = self._share.start(skip), self._share.count
        if (start, step) == (0, 1) and isinstance(self._dataset, Iterable):
            return iter(self._dataset)  # may be faster than index by index
        return (self._dataset[index] for index in range(start, len(self._dataset), step))


class StatefulSource(IterableSource):
    """A source for a dataset that finds its own position again.

    A dataset with ``set_epoch`` is told the epoch: Hugging Face's streams return to a loaded state in every iteration
    of the state's epoch.
    """

    def __init__(self, dataset: Any, share: Share) -> None:
        super().__init__(dataset, share)
        self._is_restored = False

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        if not self._is_restored:
            return super().begin(epoch, skip)
        self._is_restored = False  # the position is after the last batch taken: first skip those of the other workers
        return itertools.islice(iter(self._dataset), self._share.count - 1, None, self._share.count)

    @property
    def repeats(self) -> bool:
        return True

    def state(self) -> dict[str, Any]:
        return dict(self._dataset.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        self._dataset.load_state_dict(state)
        self._is_restored = True


class LoaderSource(Source):
    """A source for a torch DataLoader over a map-style dataset.

    The loader itself is iterated over while it is read from the start, whole and in torch's own order. Otherwise a
    loader like it is used, whose sampler skips unwanted items before they are loaded.
    """

    def __init__(self, loader: DataLoader[Any], share: Share, seed: Seed | None) -> None:
        self._loader = loader
        self._sampler = PlacedSampler(loader, share, seed)
        self._is_as_given = share.count == 1 and not self._sampler.is_seeded
        self._placed: DataLoader[Any] | None = None

    def begin(self, epoch: int, skip: int) -> Iterator[Any]:
        if self._is_as_given and not skip:
            return iter(self._loader)
        if self._placed is None:
            self._placed = rebuilt(self._loader, self._sampler)  # kept, because its worker processes may be persistent
        self._sampler.place(epoch, skip)
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._loader) if self._is_as_given else len(self._sampler)

    @property
    def repeats(self) -> bool:
        return self._sampler.is_seeded or not shuffles(self._loader)


def _check_order(loader: DataLoader[Any], share: Share) -> None:
    if share.count > 1 and shuffles(loader) and not can_seed(loader):
        raise ConfigError(
            "sharding='static': all workers must see the same order, and the random one of this "
            f"{type(loader).__name__} cannot be seeded; use torch's own DataLoader and samplers, or a sampler that "
            "reads the part which strategy.input_context names"
        )
