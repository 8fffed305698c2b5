"""The identity of a task, and of one start of it."""

from __future__ import annotations

import functools
import hmac
import os
import secrets
import time
from dataclasses import dataclass

OBSERVER = "observer:0"
"""The task name of a process that only asks for the status of a run; any number of processes may use it at once."""
STRANGER = "a peer that has not said who it is"
NONCE_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The identity of a task.

    Attributes:
        task: The task's name, such as ``worker:1``.
        token: The secret that all tasks of a run hold.
        incarnation: The name of this start of the task.
    """

    task: str
    token: str
    incarnation: str

    def proof(self, nonce: bytes, task: str = "") -> bytes:
        """Return the proof for a nonce of the peer that a task, by default this one, holds the token of this task."""
        return hmac.digest(self.token.encode(), nonce + (task or self.task).encode(), "sha256")


def new_incarnation(process: str = "") -> str:
    """Return a new name for one start of a task: of its process, of the strategy in it, and a generation of that.

    Args:
        process: The name of another process; by default this process. Names of processes sort by the time of their
            start.

    >>> one, other = new_incarnation(), new_incarnation()
    >>> one == other, one.partition(".")[0] == other.partition(".")[0]
    (False, True)
    """
    return f"{process or _process_name(os.getpid())}.{secrets.token_hex(8)}.0"


def next_generation(incarnation: str) -> str:
    """Return the name of the same strategy when it comes back after a loss; requests of earlier generations are void.

    >>> next_generation("process.strategy.0")
    'process.strategy.1'
    """
    strategy, _, generation = incarnation.rpartition(".")
    return f"{strategy}.{int(generation) + 1}"


def new_process() -> str:
    """Return a new name for a process that starts now; names sort by time.

    >>> new_process() < new_process()
    True
    """
    return f"{time.time_ns():016x}-{secrets.token_hex(4)}"


@functools.cache
def _process_name(pid: int) -> str:
    return new_process()
