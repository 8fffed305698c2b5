"""Iterators that give one element at a time, and can start again from the beginning."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.input_context import InputContext
from paramserver.distribute.core.nest import map_leaves
from paramserver.distribute.core.values import DistributedValues, PerReplica
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.input.dataset import distribute_dataset, distribute_datasets_from_function
from paramserver.distribute.input.dealing import dealing_to, is_column, places
from paramserver.distribute.input.options import InputReplicationMode
from paramserver.distribute.input.sources import is_dataset
from paramserver.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class ElementSpec:
    """The description of a leaf of an element.

    Attributes:
        shape: The shape of a tensor or array; ``(rows,)`` for a list of plain values, ``()`` for anything else.
        dtype: The dtype of a tensor or array; the type of anything else.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | np.dtype[Any] | type


class DistributedIterator(Generic[T]):
    """An iterator that gives the replicas of this worker one element at a time. Not thread-safe.

    >>> import paramserver as ps
    >>> strategy = ps.CentralStorageStrategy(["cpu:0", "cpu:1"])
    >>> iterator = strategy.make_input_fn_iterator(lambda context: range(4))
    >>> strategy.run(lambda x: x + 10, (iterator.get_next(),)).values
    (10, 11)

    Args:
        elements: The elements. A dataset begins when its first element is asked for; an iterator cannot start again.
    """

    def __init__(self, elements: Iterable[T]) -> None:
        self._elements = elements
        self._current: Iterator[T] | None = None
        self._spec: Any = None

    def initialize(self) -> None:
        """Start again from the beginning with the next element. Does nothing if a callable makes the elements."""
        if not isinstance(self._elements, Iterator):
            self._current = None

    def get_next(self) -> T:
        """Return the next element. Blocks as the dataset does.

        Raises:
            StopIteration: At the end, and from then on until `initialize`.
            ValueError: Inside a replica.
        """
        return next(self._running())

    def get_next_as_optional(self) -> T | None:
        """Return the next element, or None at the end."""
        return next(self._running(), None)

    @property
    def element_spec(self) -> Any:
        """The structure of the elements, with an `ElementSpec` for each leaf, by replica if there are several.

        The description is of the next element at the time of the first call, which may block. Later elements may have
        other sizes.

        Raises:
            ValueError: If no element is left.
        """
        if self._spec is None:
            upcoming = self.get_next_as_optional()
            if upcoming is None:
                raise ValueError("element_spec: no element is left to describe; call initialize() to start again")
            self._current = itertools.chain([upcoming], self._running())
            self._spec = map_leaves(_spec, upcoming, is_leaf=is_column)
        return self._spec

    def __iter__(self) -> DistributedIterator[T]:
        return self

    def __next__(self) -> T:
        return self.get_next()

    def _running(self) -> Iterator[T]:
        if context.current_replica() is not None:
            raise ValueError(
                "get_next should be called from outside of replica_fn: get the element first, and pass it to "
                "strategy.run(fn, args=(element,))"
            )
        if self._current is None:
            self._current = iter(self._elements)
        return self._current


def make_dataset_iterator(strategy: Worker, dataset: Iterable[Any]) -> DistributedIterator[Any]:
    """Return an iterator over a dataset whose global batches are divided among replicas; see `distribute_dataset`."""
    return DistributedIterator(distribute_dataset(strategy, dataset, None))


def make_input_fn_iterator(
    strategy: Worker, input_fn: Callable[[InputContext], Any], replication_mode: str
) -> DistributedIterator[Any]:
    """Return an iterator over a function's elements, one for each replica in turn.

    An incomplete last group of elements, with fewer than the number of replicas, is dropped.

    Args:
        strategy: The strategy of the replicas.
        input_fn: Called once, in this call and in the strategy's scope, with the part of the input that this worker is
            to read. Returns a dataset of per-replica batches, or a callable. The callable is called for each replica in
            each step, and raises StopIteration at its end.
        replication_mode: ``"PER_WORKER"``.

    Raises:
        ValueError: For another mode, on a task that does not train, or if ``input_fn`` returns anything else.
        RuntimeError: Inside a replica, or inside the scope of another strategy.
    """
    if replication_mode != InputReplicationMode.PER_WORKER:
        raise ValueError(
            f"make_input_fn_iterator: Input replication mode not supported: {replication_mode!r}; use 'PER_WORKER'"
        )
    with context.cross_replica(strategy, "make_input_fn_iterator"):
        given = input_fn(strategy.input_context)
    if is_dataset(given):
        return DistributedIterator(distribute_datasets_from_function(strategy, lambda _: given, None))
    if not callable(given):
        raise ConfigError(
            "make_input_fn_iterator: input_fn must return a dataset of batches or a callable that makes one, got a "
            f"{type(given).__name__}"
        )
    return DistributedIterator(dealing_to(places(strategy, prefetch=True), is_global=False).deal(_calls(given)))


def _calls(fn: Callable[[], Any]) -> Iterator[Any]:
    while True:
        try:
            made = fn()
        except StopIteration:
            return
        yield made


def _spec(leaf: Any) -> Any:
    if isinstance(leaf, DistributedValues):
        return PerReplica([_spec(value) for value in leaf.values])
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return ElementSpec(tuple(leaf.shape), leaf.dtype)
    return ElementSpec((len(leaf),), type(leaf[0])) if is_column(leaf) else ElementSpec((), type(leaf))
