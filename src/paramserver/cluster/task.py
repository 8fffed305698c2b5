"""The words for who is who: a role is a kind of process, a task is one process of a role."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Role(enum.StrEnum):
    """The kinds of tasks of a run. The values are what TF_CONFIG calls job names."""

    CHIEF = "chief"
    WORKER = "worker"
    PS = "ps"
    EVALUATOR = "evaluator"

    @property
    def trains(self) -> bool:
        """Whether a task of this role computes gradients: chief and worker are one family."""
        return self in (Role.CHIEF, Role.WORKER)


class TaskId(NamedTuple):
    """One process of a run, printed as ``ps:1``.

    >>> str(TaskId(Role.PS, 1))
    'ps:1'
    >>> TaskId.parse("worker:0")
    TaskId(role=<Role.WORKER: 'worker'>, index=0)
    """

    role: Role
    index: int  # type: ignore[assignment]  # tuple.index is not used

    def __str__(self) -> str:
        return f"{self.role}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> TaskId:
        """The inverse of ``str``. Raises ValueError where the text names no task."""
        role, _, index = text.partition(":")
        return cls(Role(role), int(index))


ALONE = TaskId(Role.CHIEF, 0)
"""The name of a process that has no cluster: it does what a chief does."""
