"""The cluster in the environment variable TF_CONFIG, as launchers of TensorFlow jobs write it: JSON.

``{"cluster": {"chief": [...], "worker": [...], "ps": [...]}, "task": {"type": "worker", "index": 0}}``; also
``rpc_layer`` and ``session_master``. A missing value is None or empty; a wrong value is an error.

An operator of dynamic workers, such as Kubeflow's with ``enableDynamicWorker``, tells a worker only of itself and of
the ps tasks, ``{"worker": {"1": ...}, "ps": [...]}``, and a ps only of itself, ``{"worker": {}, "ps": [...]}``. Its
older versions call that ``sparseCluster``. Here such a cluster is `ClusterSpec.one_view`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from paramserver.cluster import environment as process_environment
from paramserver.cluster.addresses import check_addresses
from paramserver.cluster.resolver import ClusterResolver, DescribedTask, format_master_url
from paramserver.cluster.roles import find_task
from paramserver.cluster.spec import ClusterSpec, parse_index
from paramserver.cluster.task import ALONE, Role, TaskId
from paramserver.errors import ConfigError

CountDevices: TypeAlias = Callable[[str | None, int | None], Mapping[str, int]]
"""Function from a task's type and id to its devices by kind, such as ``{"CPU": 1, "GPU": 2}``."""


def no_devices(task_type: str | None, task_id: int | None) -> Mapping[str, int]:
    """Return no devices, because this package knows nothing about devices."""
    return {}


class TFConfigClusterResolver(ClusterResolver):
    """Reads TF_CONFIG at every access, so that a change of the variable changes the answers.

    Args:
        task_type: Overrides the environment's.
        task_id: Overrides the environment's, even with 0.
        rpc_layer: Overrides the environment's.
        environment: The name of the environment in which the cluster runs.
        count_devices: Counts the devices of a task; by default a task has no devices.

    Every method and property that reads the environment raises ConfigError if TF_CONFIG is malformed.
    """

    def __init__(
        self,
        task_type: str | None = None,
        task_id: int | None = None,
        rpc_layer: str | None = None,
        environment: str = "",
        *,
        count_devices: CountDevices = no_devices,
    ) -> None:
        self.task_type, self.task_id, self.rpc_layer = task_type, task_id, rpc_layer
        self._environment = environment
        self._count_devices = count_devices

    def cluster_spec(self) -> ClusterSpec:
        """Return the cluster in TF_CONFIG; an empty one if it describes no cluster."""
        return _cluster(load_tf_config())

    def master(self, task_type: str | None = None, task_id: int | None = None, rpc_layer: str | None = None) -> str:
        """Return TF_CONFIG's ``session_master`` unchanged, or else the address of a task, by default of this one.

        Returns:
            The address; ``""`` if the cluster has at most one task.

        Raises:
            ConfigError: If TF_CONFIG is malformed, or the task is unknown or not in the cluster.
        """
        session_master = _text(load_tf_config(), "session_master")
        if session_master is not None:
            return session_master
        cluster = self.cluster_spec()
        if sum(cluster.num_tasks(job) for job in cluster.jobs) <= 1:
            return ""
        address = self._address(cluster, task_type, task_id)
        return format_master_url(address, self.rpc_layer if rpc_layer is None else rpc_layer)

    def num_accelerators(self, task_type: str | None = None, task_id: int | None = None) -> Mapping[str, int]:
        """Return the devices of a task, by default of this one, by kind and without CPUs."""
        devices = self._count_devices(
            self.task_type if task_type is None else task_type, self.task_id if task_id is None else task_id
        )
        return {kind: count for kind, count in devices.items() if kind != "CPU"}

    def _address(self, cluster: ClusterSpec, task_type: str | None, task_id: int | None) -> str:
        job = self.task_type if task_type is None else task_type
        index = self.task_id if task_id is None else task_id
        if job is None or index is None:
            raise ConfigError(
                f"master: expected to know which task this is, got task_type {job!r} and task_id {index!r}; "
                "pass them, or set 'task': {'type', 'index'} in TF_CONFIG"
            )
        return cluster.task_address(job, index)

    def _identify(self) -> DescribedTask:
        config = load_tf_config()
        task = _object(config, "task")
        return DescribedTask(_task_type(task), _task_index(task), _text(config, "rpc_layer"))


def as_tf_config(cluster: ClusterSpec | Mapping[str, Sequence[str]], task: TaskId) -> str:
    """Return the content of TF_CONFIG for a task of a cluster.

    >>> as_tf_config({"chief": ["a:1"], "ps": ["b:1"]}, TaskId(Role.PS, 0))
    '{"cluster": {"chief": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}'
    """
    jobs = cluster.as_dict() if isinstance(cluster, ClusterSpec) else cluster
    return json.dumps({"cluster": jobs, "task": {"type": task.role.value, "index": task.index}})


def load_tf_config() -> dict[str, object]:
    """Return the object in TF_CONFIG, with only its outermost form checked; ``{}`` if the variable is not set.

    Raises:
        ConfigError: If the variable does not hold a JSON object.
    """
    text = process_environment.read().tf_config
    try:
        config = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        found = repr(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end of the text"
        raise ConfigError(
            f"TF_CONFIG: no JSON at line {error.lineno}, column {error.colno}: {error.msg}, found {found}"
        ) from error
    if not isinstance(config, dict):
        raise _wrong("the variable", "a JSON object", config)
    return config


def task_name() -> str:
    """Return the name of this process's task, such as ``worker:1``, for logs; that of a process alone without one.

    Raises:
        ConfigError: If TF_CONFIG is malformed.
    """
    task = _object(load_tf_config(), "task")
    role, index = _task_type(task), _task_index(task)
    return f"{role}:{index or 0}" if role else str(ALONE)


def named_task() -> tuple[ClusterSpec, TaskId]:
    """Return the cluster and the task that TF_CONFIG names, for a process that is nothing else.

    The index of the task is 0 if it is not given.

    Raises:
        ConfigError: If TF_CONFIG is not set or malformed, lacks the cluster, the task or its type, or the cluster lacks
            the task.
    """
    config = load_tf_config()
    cluster, task = _cluster(config), _object(config, "task")
    task_type = _task_type(task)
    for key, value in (("cluster", cluster), ("task", task), ("task.type", task_type)):
        if not value:
            lacks = f"TF_CONFIG: {key!r} is missing" if config else "TF_CONFIG is not set"
            raise ConfigError(f"{lacks}, so this process cannot know which task of a cluster it is; add it")
    return cluster, find_task(cluster, task_type, _task_index(task) or 0)


def server_task() -> tuple[ClusterSpec, TaskId]:
    """Return the cluster and the task that TF_CONFIG names, for a process that serves.

    Raises:
        ConfigError: As for `named_task`, or if there is neither a chief nor a worker to serve.
    """
    cluster, task = named_task()
    if not (cluster.tasks(Role.CHIEF) or cluster.tasks(Role.WORKER) or cluster.is_one_view):
        raise ConfigError(f"TF_CONFIG: 'cluster': expected a chief or worker to serve, got the jobs {cluster.jobs}")
    return cluster, task


def _cluster(config: Mapping[str, object]) -> ClusterSpec:
    name = "sparseCluster" if "sparseCluster" in config and "cluster" not in config else "cluster"
    jobs = _object(config, name)
    is_one_view = name == "sparseCluster" or _is_of_one_worker(jobs)
    try:
        cluster = ClusterSpec(_own_part(jobs, config) if is_one_view else jobs)  # type: ignore[arg-type]  # checked there
        cluster = ClusterSpec.one_view(cluster) if is_one_view else cluster
        check_addresses(cluster, "cluster")
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"TF_CONFIG: {error}") from error
    return cluster


def _is_of_one_worker(jobs: Mapping[str, object]) -> bool:
    """Return whether jobs are those that an operator of dynamic workers tells one task of."""
    workers = jobs.get(Role.WORKER)
    return isinstance(workers, dict) and len(workers) <= 1 and not {Role.CHIEF, "master"} & jobs.keys()


def _own_part(jobs: Mapping[str, object], config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the jobs with the address of a ps, which is told of no other ps, at its own index."""
    task, addresses = _object(config, "task"), jobs.get(Role.PS)
    if _task_type(task) == Role.PS and isinstance(addresses, list) and len(addresses) == 1:
        return {**jobs, Role.PS: {_task_index(task) or 0: addresses[0]}}
    return jobs


def _object(config: Mapping[str, object], key: str) -> dict[str, object]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise _wrong(repr(key), "a JSON object", value)
    return value


def _text(config: Mapping[str, object], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(repr(key), "a string", value)
    return value


def _task_type(task: Mapping[str, object]) -> str | None:
    if "type" not in task:
        return None
    if isinstance(task["type"], bool) or not isinstance(task["type"], str | int):
        raise _wrong("'task.type'", "a string", task["type"])
    return str(task["type"])


def _task_index(task: Mapping[str, object]) -> int | None:
    if "index" not in task:
        return None
    try:
        return parse_index(task["index"], "'task.index'")
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"TF_CONFIG: {error}") from error


def _wrong(what: str, expected: str, got: object) -> ConfigError:
    return ConfigError(f"TF_CONFIG: {what}: expected {expected}, got {json.dumps(got)}")
