"""Surroundings in which evaluation and prediction change nothing for the program or the training around them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

from paramserver.distribute.core import context
from paramserver.distribute.strategy import Strategy

T = TypeVar("T")


class IsolatedContext:
    """Surroundings with a random state of their own, outside of the scopes that the program is in.

    They can be left and entered again: the random state continues where it was. Not thread-safe.

    Args:
        seed: The seed of the random state; None continues the program's state.
        strategy: The strategy whose scope is entered instead.
    """

    def __init__(self, seed: int | None, strategy: Strategy | None = None) -> None:
        self._seed = seed
        self._strategy = strategy
        self._state: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the surroundings for a ``with`` block."""
        with context.outside(), torch.random.fork_rng(devices=_gpus()), contextlib.ExitStack() as stack:
            if self._strategy is not None:
                stack.enter_context(self._strategy.scope())
            self._resume()
            try:
                yield
            finally:
                self._state = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in _gpus()]

    def iterate(self, items: Generator[T, None, None]) -> Generator[T, None, None]:
        """Yield the same items. Their generator runs in these surroundings; the caller's code runs in its own."""
        end = object()
        with contextlib.closing(items):
            while True:
                with self.entered():
                    item = next(items, end)
                if item is end:
                    return
                yield item  # type: ignore[misc]  # not `end`, so one of the items

    def _resume(self) -> None:
        if self._state is not None:
            here, on_gpus = self._state
            torch.set_rng_state(here)
            for gpu, state in zip(_gpus(), on_gpus, strict=False):  # a GPU may have come into use meanwhile
                torch.cuda.set_rng_state(state, gpu)
        elif self._seed is not None:
            torch.manual_seed(self._seed)


def _gpus() -> range:
    """Return the indices of the GPUs of this process; empty if it uses none."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return range(torch.cuda.device_count() if in_use else 0)
