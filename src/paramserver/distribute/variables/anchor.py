"""The variable beside which a ``with`` block creates others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_anchor: ContextVar[Any] = ContextVar("the variable that others are created beside", default=None)


@contextlib.contextmanager
def beside(variable: Any) -> Iterator[None]:
    """Have this thread, and the replicas that it runs, create variables in the ``with`` block on this variable's ps."""
    token = _anchor.set(variable)
    try:
        yield
    finally:
        _anchor.reset(token)


def current() -> Any:
    """Return the variable of the innermost `beside` block; None outside of such blocks."""
    return _anchor.get()
