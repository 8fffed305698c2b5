"""The roles of tasks in a cluster: checks, counts and ids, as functions of the cluster and of one task.

Rules
    * The jobs are roles: chief, worker, ps, evaluator. There is at most one chief and one evaluator.
    * Chief and workers are one family: the chief, if there is one, has number 0, and the workers follow.
    * Without a chief, worker:0 has its duties.
    * The evaluator stands outside: it may be absent from the cluster, and is a family of its own.
    * A parameter server is never a chief, and has no number among the workers.

A job that is listed without tasks counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping

from paramserver.cluster.spec import ClusterDef, ClusterLike, ClusterSpec, canonical_job, expected_one_of
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError

_ONLY_WORKERS = (
    "; an operator of dynamic workers tells no chief or evaluator of them: leave these out, worker:0 is the chief then"
)


def normalize_cluster_spec(value: ClusterLike) -> ClusterSpec:
    """Return a cluster in any accepted form as a `ClusterSpec`; a ClusterSpec is returned unchanged.

    Raises:
        ConfigError: If the value is not a cluster in any of these forms.
        TypeError: If something in the cluster has a wrong type.
    """
    if isinstance(value, ClusterSpec):
        return value
    if not isinstance(value, Mapping | ClusterDef):
        raise ConfigError(
            "cluster should be a dict, a ClusterSpec or a ClusterDef: "
            f"got {value!r} of type {type(value).__name__}; pass a dict such as {{'worker': ['host:port']}}"
        )
    return ClusterSpec(value)


def parse_role(task_type: str) -> Role:
    """Return the role that a task type names; ``master`` means chief, with a DeprecationWarning.

    Raises:
        ConfigError: If there is no such role.
    """
    try:
        return Role(canonical_job(task_type))
    except ValueError as error:
        raise ConfigError(f"unrecognized task_type: {expected_one_of(Role, task_type)}") from error


def validate_cluster(cluster: ClusterLike, task_type: str | None, task_id: int | None) -> TaskId:
    """Check a cluster for parameter server training, and find the task of this process in it.

    Returns:
        The task. An evaluator need not be in the cluster.

    Raises:
        ConfigError: If the task is not given or not in the cluster, or the cluster has no ps task, a job that is not a
            role, or more than one chief or evaluator.

    >>> str(validate_cluster({"ps": ["a:1"], "worker": ["b:1", "c:1"]}, "worker", 1))
    'worker:1'
    """
    spec = normalize_cluster_spec(cluster)
    _check_jobs(spec)
    if not spec.tasks(Role.PS):
        raise ConfigError(
            f"cluster needs to have a 'ps' job, for its tasks hold the variables: got the jobs {spec.jobs}; "
            f"add 'ps': ['host:port']{_ONLY_WORKERS if spec.is_one_view else ''}"
        )
    return find_task(spec, task_type, task_id)


def find_task(cluster: ClusterLike, task_type: str | None, task_id: int | None) -> TaskId:
    """Return the task with this type and id, in a cluster that need not have ps tasks.

    Raises:
        ConfigError: As for `validate_cluster`, except that ps tasks are not needed.
    """
    spec = normalize_cluster_spec(cluster)
    if not task_type or task_id is None:
        raise ConfigError(
            "a cluster is given, so this process must also specify task_type and task_id: "
            f"got task_type {task_type!r} and task_id {task_id!r} (TF_CONFIG: 'task': {{'type', 'index'}})"
        )
    task = TaskId(_find_role(spec, task_type), task_id)
    known = [other.index for other in spec.tasks(task.role)]
    is_beyond = task_id >= len(known) and not (spec.is_one_view and task_id in known)
    if task_id < 0 or (known and is_beyond):
        raise ConfigError(
            f"task {task} is not in the cluster: task_id {task_id} exceeds the maximum id of a cluster with "
            f"{len(known)} {task.role} tasks (ids start at 0); correct the id or add the task"
        )
    if known:
        spec.address(task)
    return task


def is_chief(cluster: ClusterLike, task_type: str, task_id: int) -> bool:
    """Return whether a task has the chief's duties. The evaluator is its own chief.

    Raises:
        ConfigError: As for `find_task`.
    """
    spec = normalize_cluster_spec(cluster)
    task = find_task(spec, task_type, task_id)
    if task.role is Role.WORKER:
        return task.index == 0 and not spec.tasks(Role.CHIEF)
    return task.role in (Role.CHIEF, Role.EVALUATOR)


def worker_count(cluster: ClusterLike, task_type: str) -> int:
    """Return the number of tasks that share the work of this task type: chief and workers, or the one evaluator.

    Returns:
        The number; 0 if it is not known (`ClusterSpec.is_one_view`).

    Raises:
        ConfigError: If the type is ``ps``, or as for `find_task`.

    >>> worker_count({"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1"]}, "chief")
    3
    """
    spec = normalize_cluster_spec(cluster)
    role = _find_role(spec, task_type)
    if role is Role.PS:
        raise ConfigError("unexpected task_type 'ps': expected chief, worker or evaluator; a ps computes nothing")
    if role is Role.EVALUATOR:
        return 1
    if spec.is_one_view:
        return 0
    return len(spec.tasks(Role.CHIEF)) + len(spec.tasks(Role.WORKER))


def id_in_cluster(cluster: ClusterLike, task_type: str, task_id: int) -> int:
    """Return the number of a task among those that `worker_count` counts: 0 for the chief, then the workers.

    Raises:
        ConfigError: If the type is ``ps``, or as for `find_task`.

    >>> id_in_cluster({"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1"]}, "worker", 1)
    2
    """
    spec = normalize_cluster_spec(cluster)
    task = find_task(spec, task_type, task_id)
    if task.role is Role.PS:
        raise ConfigError(f"there is no id for {task}: expected chief, worker or evaluator; a ps computes nothing")
    return task.index + (len(spec.tasks(Role.CHIEF)) if task.role is Role.WORKER else 0)


def coordination_leader(cluster: ClusterLike) -> TaskId | None:
    """Return the task that keeps the shared state of the run: the first ps, else the chief, else the first worker.

    Returns:
        The task; None if there is no cluster.

    Raises:
        ConfigError: If the cluster has no such task.
    """
    spec = normalize_cluster_spec(cluster)
    return _first_task(spec, Role.PS, Role.CHIEF, Role.WORKER) if spec else None


def collective_leader(cluster: ClusterLike, task_type: str | None, task_id: int | None) -> TaskId | None:
    """Return the leader of the tasks that train: the chief, else the first worker.

    Returns:
        The task; None if there is no cluster, and for an evaluator, which has no leader.

    Raises:
        ConfigError: As for `find_task`, or if the cluster has neither a chief nor a worker.
    """
    spec = normalize_cluster_spec(cluster)
    if not spec:
        return None
    if find_task(spec, task_type, task_id).role is Role.EVALUATOR:
        return None
    return _first_task(spec, Role.CHIEF, Role.WORKER)


def _check_jobs(spec: ClusterSpec) -> None:
    for job in spec.jobs:
        if job not in tuple(Role):
            raise ConfigError(f"disallowed task type in the cluster: {expected_one_of(Role, job)}")
    for role in (Role.CHIEF, Role.EVALUATOR):
        addresses = [spec.address(task) for task in spec.tasks(role)]
        if len(addresses) > 1:
            raise ConfigError(f"cluster may have at most one {role}, got {addresses}; keep one of them")


def _find_role(spec: ClusterSpec, task_type: str) -> Role:
    _check_jobs(spec)
    role = parse_role(task_type)
    if role is not Role.EVALUATOR and not spec.tasks(role):
        raise ConfigError(
            f"task_type {str(role)!r} not found in the cluster: expected one of {spec.jobs}; "
            "add the job to the cluster or correct the task_type"
        )
    return role


def _first_task(spec: ClusterSpec, *roles: Role) -> TaskId:
    for role in roles:
        if tasks := spec.tasks(role):
            return tasks[0]
    raise ConfigError(f"cluster has no leader: expected a {' or '.join(roles)}, got the jobs {spec.jobs}")
