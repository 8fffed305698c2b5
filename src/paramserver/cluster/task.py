"""Roles and tasks: a role is a kind of process, a task is one process of a role."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Role(enum.StrEnum):
    """The roles of the tasks of a run. The values are the job names in TF_CONFIG."""

    CHIEF = "chief"
    WORKER = "worker"
    PS = "ps"
    EVALUATOR = "evaluator"

    @property
    def trains(self) -> bool:
        """Whether a task of this role computes gradients, as the chief and workers do."""
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
        """Return the task for a text such as ``ps:1``, the inverse of ``str``.

        Raises:
            ValueError: If the text does not name a task.
        """
        role, _, index = text.partition(":")
        return cls(Role(role), int(index))


ALONE = TaskId(Role.WORKER, 0)
"""The name of a process without a cluster: the only worker, which has the duties of the chief."""
