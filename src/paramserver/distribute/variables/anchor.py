"""The variable that others are created beside, in the middle of a ``with`` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_anchor: ContextVar[Any] = ContextVar("the variable that others are created beside", default=None)


@contextlib.contextmanager
def beside(variable: Any) -> Iterator[None]:
    """In the ``with`` block this thread, and replicas that it runs, create variables on this variable's ps."""
    token = _anchor.set(variable)
    try:
        yield
    finally:
        _anchor.reset(token)


def current() -> Any:
    """Return that variable; None outside of such blocks."""
    return _anchor.get()
