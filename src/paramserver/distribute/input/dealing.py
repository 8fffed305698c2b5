"""The dealing of a dataset's batches to the replicas of a worker.

Rules
    * With one replica a batch passes unchanged; with several, each leaf of it becomes a `PerReplica`.
    * A leaf is a tensor or array, or a *column*: a list of plain values, such as texts. Anything else is a structure.
    * A batch is either *global*, and divided among the replicas, or for one replica, and dealt out with the batches
      that follow it. Left out are a global batch with fewer rows than replicas, and an incomplete last group of
      batches: an empty batch would make a mean loss NaN.
"""

from __future__ import annotations

import abc
import itertools
import logging
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from paramserver.distribute.core.devices import Device
from paramserver.distribute.core.nest import map_leaves
from paramserver.distribute.core.values import PerReplica
from paramserver.distribute.core.worker import Worker
from paramserver.errors import ConfigError

logger = logging.getLogger(__name__)

Destination = torch.device | None
"""The device for a replica's tensors; None leaves them where they are."""


def places(strategy: Worker, prefetch: bool) -> tuple[Destination, ...]:
    """Return the device of each replica; None for a replica whose batches need not be moved."""
    devices = [Device.parse(name).torch_device for name in strategy.worker_devices]
    return tuple(device if prefetch and device.type != "cpu" else None for device in devices)


def dealing_to(places: Sequence[Destination], *, is_global: bool) -> Dealing:
    """Return the way to deal batches to replicas at these places."""
    if len(places) == 1:
        return Whole(places)
    return Divided(places) if is_global else Grouped(places)


class Dealing(abc.ABC):
    """Converts batches into the replicas' data.

    Args:
        places: The place of each replica.
    """

    def __init__(self, places: Sequence[Destination]) -> None:
        self._places = tuple(places)

    @abc.abstractmethod
    def deal(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the replicas' data from these batches, in order. Draws each batch only when it is needed."""

    def length(self, batches: int) -> int:
        """Return the largest number of elements that these batches can give."""
        return batches


class Whole(Dealing):
    """Deals every batch unchanged to a single replica."""

    def deal(self, batches: Iterator[Any]) -> Iterator[Any]:
        (place,) = self._places
        return batches if place is None else (brought(batch, place) for batch in batches)


class Divided(Dealing):
    """Divides each batch among several replicas: parts differ by one row at most, and the first ones are larger."""

    _has_dropped = False

    def deal(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            rows = count_rows(batch, len(self._places))
            if rows >= len(self._places):
                yield map_leaves(lambda leaf, rows=rows: self._divided(leaf, rows), batch, is_leaf=is_column)
            elif not self._has_dropped:
                self._has_dropped = True
                logger.warning(
                    "a batch of %d rows is left out, like every batch with fewer rows than the %d replicas",
                    rows,
                    len(self._places),
                )

    def _divided(self, leaf: Any, rows: int) -> Any:
        if leaf is None:
            return None
        each, more = divmod(rows, len(self._places))
        starts = [index * each + min(index, more) for index in range(len(self._places) + 1)]
        parts = [leaf[start:stop] for start, stop in itertools.pairwise(starts)]
        return PerReplica([brought(part, place) for part, place in zip(parts, self._places, strict=True)])


class Grouped(Dealing):
    """Deals as many batches at a time as there are replicas."""

    _has_dropped = False

    def deal(self, batches: Iterator[Any]) -> Iterator[Any]:
        while len(group := list(itertools.islice(batches, len(self._places)))) == len(self._places):
            own = [brought(batch, place) for batch, place in zip(group, self._places, strict=True)]
            yield map_leaves(lambda *each: PerReplica(each), *own, is_leaf=is_column)
        if group and not self._has_dropped:
            self._has_dropped = True
            logger.warning(
                "the last %d batches are left out, like every group of fewer batches than the %d replicas",
                len(group),
                len(self._places),
            )

    def length(self, batches: int) -> int:
        return batches // len(self._places)


def brought(batch: Any, place: Destination) -> Any:
    """Move a batch's tensors to a place; from pinned memory, without waiting for the copy."""
    if place is None:
        return batch
    return map_leaves(lambda leaf: leaf.to(place, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, batch)


def is_column(part: object) -> bool:
    """Return whether a list holds one plain value for each row, or a tuple one text, as torch collates texts.

    >>> is_column(["a", "b"]), is_column([1.5, 2.5]), is_column([torch.zeros(2)]), is_column((1.5, 2))
    (True, True, False, False)
    """
    if type(part) is list:
        return bool(part) and all(isinstance(value, (str, bytes, numbers.Number)) for value in part)
    return type(part) is tuple and bool(part) and all(isinstance(value, (str, bytes)) for value in part)


def count_rows(batch: Any, replicas: int) -> int:
    """Return the number of rows of a batch that is to be divided.

    Raises:
        ConfigError: If a leaf has no leading dimension, or the leading dimensions differ.
    """
    found: set[int] = set()
    map_leaves(lambda leaf: found.update(_rows(leaf, replicas)), batch, is_leaf=is_column)
    if len(found) != 1:
        sizes = f"leading dimensions of {sorted(found)}" if found else "no tensor in it"
        raise ConfigError(
            f"a batch cannot be divided among {replicas} replicas: expected tensors, arrays or lists with one leading "
            f"batch dimension in common, got {sizes}"
        )
    return found.pop()


def _rows(leaf: Any, replicas: int) -> tuple[int, ...]:
    if leaf is None:
        return ()
    if is_column(leaf) or (isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim):
        return (len(leaf),)
    shape = f" of shape {list(leaf.shape)}" if hasattr(leaf, "shape") else ""
    raise ConfigError(
        f"what the dataset gives cannot be divided among {replicas} replicas: expected batches of tensors, arrays or "
        f"lists with a leading batch dimension, got a {type(leaf).__name__}{shape}; batch the dataset first: wrap it "
        "in a torch DataLoader with a batch_size"
    )
