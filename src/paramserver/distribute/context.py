"""Which strategy is in effect, for each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paramserver.distribute.strategy import Strategy


class _Entered(threading.local):
    strategy: Strategy | None = None


_entered = _Entered()


def get_strategy() -> Strategy | None:
    """The strategy whose scope this thread is in, None outside of any."""
    return _entered.strategy


def has_strategy() -> bool:
    """Whether this thread is inside a strategy's scope."""
    return _entered.strategy is not None


@contextlib.contextmanager
def entered(strategy: Strategy) -> Iterator[Strategy]:
    """Put a strategy into effect. Entering it again inside its own scope is allowed.

    Raises:
        RuntimeError: Inside the scope of another strategy.
    """
    outer = _entered.strategy
    if outer is not None and outer is not strategy:
        raise RuntimeError(
            f"Mixing different strategies: {strategy!r} was entered inside the scope of {outer!r}; leave that first"
        )
    _entered.strategy = strategy
    try:
        yield strategy
    finally:
        _entered.strategy = outer
