"""The tasks of a run and their addresses: the one value that every task of a run agrees on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeAlias, runtime_checkable

from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError, did_you_mean

MASTER_MESSAGE = "the job name 'master' is an old spelling of 'chief': rename it in cluster and task"


class JobDef(Protocol):
    """One job of a `ClusterDef`."""

    @property
    def name(self) -> str:
        """The name of the job."""

    @property
    def tasks(self) -> Mapping[int, str]:
        """Addresses of the tasks by index."""


@runtime_checkable
class ClusterDef(Protocol):
    """The attributes of TensorFlow's protobuf of a cluster, so that one is accepted without TensorFlow."""

    @property
    def job(self) -> Iterable[JobDef]:
        """Jobs of the cluster."""


Tasks: TypeAlias = list[str] | tuple[str, ...] | Mapping[int, str] | Mapping[str, str]
ClusterLike: TypeAlias = "ClusterSpec | ClusterDef | Mapping[str, Tasks]"


class ClusterSpec:
    """Jobs, their tasks and the tasks' addresses. Immutable, hashable, equal by content.

    Any job name is accepted; `paramserver.cluster.validate_cluster` checks that the names are roles.

    Args:
        cluster: Addresses by job: a list (the index is the position) or a dict from index to address (which may have
            holes), another ClusterSpec, or a `ClusterDef`. The job ``master`` becomes ``chief``.

    Raises:
        TypeError: If the cluster, a job's tasks, a job name or an address has another type.
        ConfigError: If a job is named twice (``master`` means ``chief``), or an index is malformed.

    >>> cluster = ClusterSpec({"worker": ["a:1", "b:1"], "ps": {"0": "c:1", "2": "d:1"}})
    >>> cluster
    ClusterSpec({'ps': {0: 'c:1', 2: 'd:1'}, 'worker': ['a:1', 'b:1']})
    >>> cluster.job_tasks("ps")
    ['c:1', None, 'd:1']
    >>> [str(task) for task in cluster.tasks(Role.PS)]
    ['ps:0', 'ps:2']
    """

    __slots__ = ("_is_one_view", "_jobs")

    def __init__(self, cluster: ClusterLike) -> None:
        self._is_one_view: bool = isinstance(cluster, ClusterSpec) and cluster._is_one_view
        self._jobs: dict[str, dict[int, str]] = {}
        for name, tasks in _named_jobs(cluster):
            job = canonical_job(_text(name, "job name"))
            if job in self._jobs:
                raise ConfigError(f"cluster: job {job!r} is given twice ('master' means 'chief'); keep one")
            self._jobs[job] = _parse_tasks(job, tasks)

    @classmethod
    def one_view(cls, cluster: ClusterLike) -> ClusterSpec:
        """Return a cluster as seen by a task that does not know the other workers; see `is_one_view`."""
        spec = cls(cluster)
        spec._is_one_view = True
        return spec

    @property
    def is_one_view(self) -> bool:
        """Whether the number of workers is not known, because the cluster lists this task and ps tasks only.

        An operator that adds and removes workers tells each task only of itself and of the ps tasks. A cluster that
        lacks a worker of a lower index than another is taken for such a view, too.
        """
        workers = self._jobs.get(Role.WORKER, ())
        return self._is_one_view or list(workers) != list(range(len(workers)))

    @property
    def jobs(self) -> list[str]:
        """Names of the jobs, in the given order."""
        return list(self._jobs)

    def num_tasks(self, job: str) -> int:
        """Return the number of tasks of a job.

        Raises:
            ConfigError: If there is no such job.
        """
        return len(self._job(job))

    def task_indices(self, job: str) -> list[int]:
        """Return the indices of a job's tasks, ascending.

        Raises:
            ConfigError: If there is no such job.
        """
        return list(self._job(job))

    def task_address(self, job: str, index: int) -> str:
        """Return the address of one task.

        Raises:
            ConfigError: If there is no such job or index.
        """
        tasks = self._job(job)
        if index not in tasks:
            known = ", ".join(map(str, tasks)) or "none"
            raise ConfigError(
                f"cluster has no task with index {index!r} in job {str(job)!r}: its indices are {known}; "
                "add the task to the cluster or change the index"
            )
        return tasks[index]

    def job_tasks(self, job: str) -> list[str | None]:
        """Return the addresses of a job by position, None for a hole.

        Raises:
            ConfigError: If there is no such job.
        """
        tasks = self._job(job)
        return [tasks.get(index) for index in range(max(tasks, default=-1) + 1)]

    def as_dict(self) -> dict[str, list[str] | dict[int, str]]:
        """Return a new dict in the form that the constructor takes.

        A job without holes is a list, a job with holes is a dict by index, and a job without tasks is ``{}``.
        """
        return {job: _list_if_dense(tasks) for job, tasks in self._jobs.items()}

    def tasks(self, role: Role) -> list[TaskId]:
        """Return the tasks of a role by ascending index; an empty list if the cluster lacks the role."""
        return [TaskId(role, index) for index in self._jobs.get(role, ())]

    def address(self, task: TaskId) -> str:
        """Return the address of a task.

        Raises:
            ConfigError: If the cluster lacks the task.
        """
        return self.task_address(task.role, task.index)

    def _job(self, job: str) -> dict[int, str]:
        job = canonical_job(job)
        if job not in self._jobs:
            raise ConfigError(f"no such job in the cluster: {expected_one_of(self._jobs, job)}")
        return self._jobs[job]

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def __eq__(self, other: object) -> bool:
        return self._jobs == other._jobs if isinstance(other, ClusterSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset((job, frozenset(tasks.items())) for job, tasks in self._jobs.items()))

    def __repr__(self) -> str:
        return f"ClusterSpec({dict(sorted(self.as_dict().items()))})"


def canonical_job(job: str) -> str:
    """Return the name of a job as this package spells it: ``chief`` for ``master``, with a DeprecationWarning."""
    if job != "master":
        return str(job)
    warnings.warn(MASTER_MESSAGE, DeprecationWarning, stacklevel=_levels_to_user())
    return str(Role.CHIEF)


def expected_one_of(known: Iterable[str], got: object) -> str:
    """Return the part of a message that lists the known names, and the one that was probably meant.

    >>> expected_one_of(["worker", "ps"], "workers")
    "expected one of 'worker', 'ps', got 'workers'; did you mean 'worker'?"
    """
    names = [str(name) for name in known]
    return f"expected one of {', '.join(map(repr, names)) or '(no jobs)'}, got {got!r}{did_you_mean(str(got), names)}"


def parse_index(value: object, what: str) -> int:
    """Return a task index from a number or from its digits.

    Args:
        value: The value to parse.
        what: The name of the value, for messages.

    Raises:
        TypeError: If the value is neither an int nor a string.
        ConfigError: If the value is negative, or a string that is not all digits.
    """
    message = f"{what}: expected a task index (0, 1, ...), got {value!r} of type {type(value).__name__}"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(message)
    text = str(value).strip()
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(message)
    return int(text)


def _named_jobs(cluster: object) -> Iterable[tuple[object, object]]:
    if isinstance(cluster, ClusterSpec):
        return cluster._jobs.items()
    if isinstance(cluster, Mapping):
        return cluster.items()
    if isinstance(cluster, ClusterDef):
        return [(job.name, job.tasks) for job in cluster.job]
    raise TypeError(
        "cluster: expected a dict from job to tasks, a ClusterSpec or a ClusterDef, "
        f"got {cluster!r} of type {type(cluster).__name__}"
    )


def _parse_tasks(job: str, tasks: object) -> dict[int, str]:
    if isinstance(tasks, list | tuple):
        tasks = dict(enumerate(tasks))
    if not isinstance(tasks, Mapping):
        raise TypeError(
            f"cluster: tasks of job {job!r}: expected a list of addresses or a dict from index to address, "
            f"got {tasks!r} of type {type(tasks).__name__}"
        )
    indices = [parse_index(index, f"cluster: job {job!r}") for index in tasks]
    addresses = [_text(address, f"address in job {job!r}") for address in tasks.values()]
    if len(set(indices)) < len(indices):
        raise ConfigError(f"cluster: job {job!r} gives an index twice: {sorted(indices)}; keep one of them")
    return dict(sorted(zip(indices, addresses, strict=True)))


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"cluster: {what}: expected a string, got {value!r} of type {type(value).__name__}")
    return value


def _list_if_dense(tasks: Mapping[int, str]) -> list[str] | dict[int, str]:
    is_dense = bool(tasks) and max(tasks) + 1 == len(tasks)
    return list(tasks.values()) if is_dense else dict(tasks)


def _levels_to_user() -> int:
    """Return the stack level of the first caller outside this package, where Python shows deprecations."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level
