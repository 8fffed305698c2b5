"""DataLoaders that load a part of another loader's data, in an order that can be repeated."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from paramserver.distribute.input.share import Seed, Share


class PlacedSampler(Sampler[Any]):
    """The indices of a loader, or batches of indices: those of a share, in an epoch, from a position on.

    If the loader makes its batches from a sampler's indices in turn, every worker takes every n-th index and makes
    batches of those; if the program samples whole batches, every worker takes every n-th batch.

    Args:
        loader: The loader of the indices.
        share: The share of its indices or batches.
        seed: The seed of random samplers; None leaves them unchanged.
    """

    def __init__(self, loader: DataLoader[Any], share: Share, seed: Seed | None) -> None:
        sampler = _index_sampler(loader)
        self._batch_sampler = sampler if type(sampler) is BatchSampler else None
        self._drawn = _drawn(loader)
        self._share = share
        self._seed = seed if _is_random(self._drawn) else None
        self._epoch = self._skip = 0

    def place(self, epoch: int, skip: int) -> None:
        """Set the epoch of later iterations, and the number of batches that they skip at its start."""
        self._epoch, self._skip = epoch, skip

    def __iter__(self) -> Iterator[Any]:
        drawn = self._drawn if self._seed is None else _seeded(self._drawn, self._seed, self._epoch)
        own = itertools.islice(iter(drawn), self._share.index, None, self._share.count)
        made = own if self._batch_sampler is None else iter(self._batches(own))
        return itertools.islice(made, self._skip, None)

    def __len__(self) -> int:
        own = range(self._share.length(len(cast(Sized, self._drawn))))
        return len(own) if self._batch_sampler is None else len(self._batches(own))

    @property
    def is_seeded(self) -> bool:
        """Whether the order comes from the seed, and is therefore the same whenever an epoch is repeated."""
        return self._seed is not None

    def _batches(self, indices: Iterable[int]) -> BatchSampler:
        assert self._batch_sampler is not None  # noqa: S101  # the callers have checked it
        return BatchSampler(indices, self._batch_sampler.batch_size, self._batch_sampler.drop_last)


def rebuilt(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """Return a loader like another one, with a sampler: of batches if the other makes batches, otherwise of items."""
    batching: dict[str, Any] = (
        {"batch_size": None, "sampler": sampler} if loader.batch_sampler is None else {"batch_sampler": sampler}
    )
    return DataLoader(
        loader.dataset,
        **batching,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
        in_order=loader.in_order,
    )


def shuffles(loader: DataLoader[Any]) -> bool:
    """Return whether a loader's order is random.

    >>> shuffles(DataLoader(range(3))), shuffles(DataLoader(range(3), shuffle=True))
    (False, True)
    """
    return _is_random(_index_sampler(loader)) or _is_random(getattr(_index_sampler(loader), "sampler", None))


def can_seed(loader: DataLoader[Any]) -> bool:
    """Return whether a `PlacedSampler` can seed the loader's random sampler."""
    return type(loader) is DataLoader and _is_random(_drawn(loader))


def _drawn(loader: DataLoader[Any]) -> Iterable[Any]:
    sampler = _index_sampler(loader)
    return sampler.sampler if type(sampler) is BatchSampler else sampler


def _index_sampler(loader: DataLoader[Any]) -> Iterable[Any]:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _is_random(sampler: object) -> bool:
    return hasattr(sampler, "generator")  # all of torch's own random samplers have this attribute


def _seeded(sampler: Iterable[Any], seed: Seed, epoch: int) -> Iterable[Any]:
    mixed = np.random.SeedSequence((seed.value, epoch, seed.stream)).generate_state(1, np.uint64)
    twin = copy.copy(sampler)
    twin.generator = torch.Generator().manual_seed(int(mixed[0]))  # type: ignore[attr-defined]  # see `_is_random`
    return twin
