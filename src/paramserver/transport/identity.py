"""Who a task is, and which start of it."""

from __future__ import annotations

import functools
import os
import secrets
from dataclasses import dataclass

OBSERVER = "observer:0"
"""Who takes no part in a run and asks how it stands. Any number of processes may say so at once."""
STRANGER = "a peer that has not said who it is"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a task is.

    Attributes:
        task: Such as ``worker:1``.
        token: The secret that all tasks of a run hold.
        incarnation: Which start of the task this is.
    """

    task: str
    token: str
    incarnation: str


def new_incarnation(process: str = "") -> str:
    """A name for one start of a task: for one strategy of a process, whose name comes first.

    Args:
        process: The name of another process than this one.

    >>> one, other = new_incarnation(), new_incarnation()
    >>> one == other, one.partition(".")[0] == other.partition(".")[0]
    (False, True)
    """
    return f"{process or _process_name(os.getpid())}.{secrets.token_hex(8)}"


@functools.cache
def _process_name(pid: int) -> str:
    return secrets.token_hex(8)
