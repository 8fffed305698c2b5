"""Resolvers: sources of cluster descriptions, which also know the task of this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

from paramserver.cluster.spec import ClusterSpec, canonical_job
from paramserver.errors import ConfigError


class DuplicateTaskError(ConfigError, KeyError):
    """Raised if two resolvers of a union describe the same task. Also a KeyError, as for any key given twice."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class DescribedTask(NamedTuple):
    """The description of this process by a resolver; None stands for unknown."""

    task_type: str | None = None
    task_id: int | None = None
    rpc_layer: str | None = None


class ClusterResolver(ABC):
    """Describes the cluster and the task of this process in it.

    A new source of clusters implements `cluster_spec` and `master`, and `_identify` if it knows the task of this
    process. ``task_type``, ``task_id`` and ``rpc_layer`` can be set; a value that was set takes precedence over one
    that was found, and setting None restores the latter.
    """

    linger: float = 0.0
    """Seconds that a ps that is asked to leave goes on serving while workers are connected, unless the environment says
    otherwise. Above 0 for an engine that asks all tasks at once, among them a chief that still has to save."""

    _task_type: str | None = None
    _task_id: int | None = None
    _rpc_layer: str | None = None
    _environment: str = ""

    @abstractmethod
    def cluster_spec(self) -> ClusterSpec:
        """Return the cluster as it is now; an empty one for a process without a cluster."""

    @abstractmethod
    def master(self, task_type: str | None = None, task_id: int | None = None, rpc_layer: str | None = None) -> str:
        """Return the address of a task, by default of this one; ``""`` for a process without a cluster.

        Raises:
            ConfigError: If the task is not in the cluster.
        """

    def num_accelerators(self, task_type: str | None = None, task_id: int | None = None) -> Mapping[str, int]:
        """Return the accelerators of a task by kind, such as ``{"GPU": 2}``; empty if none is known."""
        return {}

    @property
    def task_type(self) -> str | None:
        """The role of this process as text; None if it is not known."""
        if self._task_type is not None:
            return self._task_type
        found = self._identify().task_type
        return None if found is None else canonical_job(found)

    @task_type.setter
    def task_type(self, value: str | None) -> None:
        self._task_type = None if value is None else canonical_job(value)

    @property
    def task_id(self) -> int | None:
        """The index of this process among the tasks of its role; None if it is not known."""
        return self._identify().task_id if self._task_id is None else self._task_id

    @task_id.setter
    def task_id(self, value: int | None) -> None:
        self._task_id = value

    @property
    def rpc_layer(self) -> str | None:
        """The protocol that `master` puts before an address; None for no protocol."""
        return self._identify().rpc_layer if self._rpc_layer is None else self._rpc_layer

    @rpc_layer.setter
    def rpc_layer(self, value: str | None) -> None:
        self._rpc_layer = value

    @property
    def environment(self) -> str:
        """The name of the environment in which the cluster runs; ``""`` if it has none."""
        return self._environment

    def _identify(self) -> DescribedTask:
        return DescribedTask()


class SimpleClusterResolver(ClusterResolver):
    """A resolver with fixed answers.

    Args:
        cluster_spec: The cluster.
        master: The result of `master` if no task is named.
        task_type: The role of this process.
        task_id: The index of this process.
        environment: The name of the environment in which the cluster runs.
        num_accelerators: The result of `num_accelerators` for every task.
        rpc_layer: The protocol that `master` puts before an address.

    Raises:
        TypeError: If ``cluster_spec`` is not a ClusterSpec, or ``master`` is not a string.

    >>> cluster = ClusterSpec({"ps": ["a:1"], "worker": ["b:1"]})
    >>> SimpleClusterResolver(cluster, rpc_layer="grpc").master("worker", 0)
    'grpc://b:1'
    """

    def __init__(
        self,
        cluster_spec: ClusterSpec,
        master: str = "",
        task_type: str | None = None,
        task_id: int | None = None,
        environment: str = "",
        num_accelerators: Mapping[str, int] | None = None,
        rpc_layer: str | None = None,
    ) -> None:
        _check_type("cluster_spec", cluster_spec, ClusterSpec)
        _check_type("master", master, str)
        self._cluster_spec = cluster_spec
        self._master = master
        self._environment = environment
        self._num_accelerators: Mapping[str, int] = {} if num_accelerators is None else num_accelerators
        self.task_type, self.task_id, self.rpc_layer = task_type, task_id, rpc_layer

    def cluster_spec(self) -> ClusterSpec:
        """Return the given cluster."""
        return self._cluster_spec

    def master(self, task_type: str | None = None, task_id: int | None = None, rpc_layer: str | None = None) -> str:
        """Return the given master, or the address of a task if both type and id are given."""
        address = self._master
        if task_type is not None and task_id is not None:
            address = self._cluster_spec.task_address(task_type, task_id)
        return format_master_url(address, rpc_layer or self.rpc_layer)

    def num_accelerators(self, task_type: str | None = None, task_id: int | None = None) -> Mapping[str, int]:
        """Return the given accelerators, the same for every task."""
        return self._num_accelerators


class UnionClusterResolver(ClusterResolver):
    """Several resolvers as one: their clusters are merged, everything else comes from the first.

    The lists of a job are joined in order. If one resolver gives a job by index (with holes), all are merged by index,
    where lists count from 0.

    Args:
        *resolvers: The resolvers, at least one.
        task_type: Overrides that of the first resolver.
        task_id: Overrides that of the first resolver, even with 0.
        rpc_layer: Overrides that of the first resolver.
        **unexpected: Refused.

    Raises:
        ConfigError: If there is no resolver, or another keyword.
        TypeError: If an argument is not a resolver.
    """

    def __init__(
        self,
        *resolvers: ClusterResolver,
        task_type: str | None = None,
        task_id: int | None = None,
        rpc_layer: str | None = None,
        **unexpected: object,
    ) -> None:
        if unexpected:
            raise ConfigError(f"unexpected {sorted(unexpected)}: expected task_type, task_id, rpc_layer")
        if not resolvers:
            raise ConfigError("UnionClusterResolver: expected at least one cluster resolver, got none")
        for resolver in resolvers:
            _check_type("UnionClusterResolver argument", resolver, ClusterResolver)
        self._resolvers = resolvers
        self.task_type, self.task_id, self.rpc_layer = task_type, task_id, rpc_layer

    def cluster_spec(self) -> ClusterSpec:
        """Return the merged cluster.

        Raises:
            DuplicateTaskError: If two resolvers give the same index of a job that is merged by index.
        """
        parts: dict[str, list[list[str] | dict[int, str]]] = defaultdict(list)
        for resolver in self._resolvers:
            for job, tasks in resolver.cluster_spec().as_dict().items():
                parts[job] += [tasks] if tasks else []
        return ClusterSpec({job: _merge(job, tasks) for job, tasks in parts.items()})

    def master(self, task_type: str | None = None, task_id: int | None = None, rpc_layer: str | None = None) -> str:
        """Return the master of the first resolver, or the address of a task if both type and id are given."""
        layer = rpc_layer or self.rpc_layer
        if task_type is None or task_id is None:
            return self._resolvers[0].master(rpc_layer=layer)
        return format_master_url(self.cluster_spec().task_address(task_type, task_id), layer)

    def num_accelerators(self, task_type: str | None = None, task_id: int | None = None) -> Mapping[str, int]:
        """Return the accelerators that the first resolver knows."""
        return self._resolvers[0].num_accelerators(task_type, task_id)

    @property
    def environment(self) -> str:
        """The environment of the first resolver."""
        return self._resolvers[0].environment

    def _identify(self) -> DescribedTask:
        first = self._resolvers[0]
        return DescribedTask(first.task_type, first.task_id, first.rpc_layer)


def format_master_url(address: str, rpc_layer: str | None = None) -> str:
    """Return an address with its protocol, if any, in front.

    >>> format_master_url("a:1"), format_master_url("a:1", "grpc")
    ('a:1', 'grpc://a:1')
    """
    return f"{rpc_layer}://{address}" if rpc_layer else address


def _merge(job: str, parts: list[list[str] | dict[int, str]]) -> list[str] | dict[int, str]:
    lists = [part for part in parts if isinstance(part, list)]
    if len(lists) == len(parts):
        return list(chain.from_iterable(lists))
    merged: dict[int, str] = {}
    for part in parts:
        tasks = dict(enumerate(part)) if isinstance(part, list) else part
        if duplicates := sorted(merged.keys() & tasks.keys()):
            raise DuplicateTaskError(f"duplicate keys: two resolvers give {job!r} the indices {duplicates}")
        merged |= tasks
    return merged


def _check_type(what: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{what}: expected {expected.__name__}, got {value!r} of type {type(value).__name__}")
