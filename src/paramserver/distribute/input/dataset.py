"""Datasets of batches, dealt to the replicas of a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from paramserver.distribute.input.context import InputContext, ValueContext
from paramserver.distribute.input.options import InputOptions
from paramserver.distribute.values import PerReplica

if TYPE_CHECKING:
    from paramserver.distribute.strategy import Strategy

T = TypeVar("T")


class DistributedDataset(Generic[T]):
    """Iterates over a dataset's batches. Each iteration begins anew."""

    def __init__(self, dataset: Iterable[T]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[T]:
        return iter(self._dataset)

    def __len__(self) -> int:
        """The number of batches.

        Raises:
            TypeError: If the dataset does not know it.
        """
        return len(self._dataset)  # type: ignore[arg-type]  # it says so itself if it has none


class DistributedIterator(Generic[T]):
    """Deals elements to replicas."""


def distribute_dataset(
    strategy: Strategy, dataset: Iterable[Any], options: InputOptions | None
) -> DistributedDataset[Any]:
    return DistributedDataset(dataset)


def distribute_datasets_from_function(
    strategy: Strategy, fn: Callable[[InputContext], Iterable[Any]], options: InputOptions | None
) -> DistributedDataset[Any]:
    raise NotImplementedError


def distribute_values_from_function(strategy: Strategy, fn: Callable[[ValueContext], T]) -> PerReplica[T]:
    raise NotImplementedError


def make_dataset_iterator(strategy: Strategy, dataset: Iterable[Any]) -> DistributedIterator[Any]:
    raise NotImplementedError


def make_input_fn_iterator(
    strategy: Strategy, input_fn: Callable[[InputContext], Any], replication_mode: str
) -> DistributedIterator[Any]:
    raise NotImplementedError


def make_numpy_dataset(strategy: Strategy, arrays: Any) -> Any:
    raise NotImplementedError
