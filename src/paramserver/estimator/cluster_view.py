"""The task of the cluster that this process is, according to TF_CONFIG at one moment.

Rules
    * Without a cluster the process is ``worker:0``, the chief, and alone.
    * The evaluator sees no cluster: it talks to no other task, and no id leads to it.
    * Ids count the chief first, then the other jobs by name, ps last.
    * A job that is not a role may be in the cluster: its tasks have ids and take no part in a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from paramserver.cluster import ClusterSpec, Role, TaskId, TFConfigClusterResolver, find_task, is_chief
from paramserver.cluster.task import ALONE
from paramserver.cluster.tf_config import load_tf_config
from paramserver.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ClusterView:
    """One task's view of its cluster: TF_CONFIG at one moment, checked."""

    task: TaskId
    cluster_spec: ClusterSpec = field(default_factory=lambda: ClusterSpec({}))
    """The training cluster. Empty without a cluster, and for the evaluator, which is not part of it."""
    is_chief: bool = False
    num_ps_replicas: int = 0
    num_worker_replicas: int = 0
    """Number of tasks that compute gradients, including the chief; 0 if it is not known."""
    global_id_in_cluster: int | None = None
    """The number of this task: the chief first, then the other jobs by name, ps last; None for the evaluator, and if
    the number of workers is not known."""
    master: str = ""
    evaluation_master: str = ""
    service: Mapping[str, object] | None = None
    """TF_CONFIG's ``service``, unchanged."""
    lacks_chief: bool = False
    """Whether there is a cluster without a task of role chief."""
    model_dir: object = None
    """TF_CONFIG's ``model_dir``, unchanged."""

    @classmethod
    def from_environment(cls) -> ClusterView:
        """Read TF_CONFIG.

        Raises:
            ConfigError: If it is malformed, or names a task that does not fit its cluster.
            TypeError: If its ``service`` is not a dict.
        """
        config = load_tf_config()
        return replace(cls._of(TFConfigClusterResolver(), config), model_dir=config.get("model_dir"))

    @classmethod
    def _of(cls, resolver: TFConfigClusterResolver, config: Mapping[str, object]) -> ClusterView:
        cluster = resolver.cluster_spec()
        if not cluster:
            return _local_view(resolver, config)
        _check_chiefs(cluster)
        if resolver.task_type == Role.EVALUATOR:
            return _evaluator_view(cluster, resolver, config)
        roles = _only_roles(cluster)
        job, index = resolver.task_type, resolver.task_id
        is_foreign = job in cluster.jobs and not _is_role(job)
        task = _foreign_task(cluster, job, index) if is_foreign else find_task(roles, job, index)
        return cls(
            cluster_spec=cluster,
            task=task,
            is_chief=not is_foreign and is_chief(roles, task.role, task.index),
            num_ps_replicas=len(cluster.tasks(Role.PS)),
            num_worker_replicas=0 if cluster.is_one_view else len(roles.tasks(Role.CHIEF) + roles.tasks(Role.WORKER)),
            global_id_in_cluster=None if cluster.is_one_view else _tasks_by_global_id(cluster).index(task),
            master=resolver.master(rpc_layer=resolver.rpc_layer or "grpc"),
            evaluation_master=_text(config, "eval_session_master"),
            service=_service(config),
            lacks_chief=not cluster.tasks(Role.CHIEF),
        )


def _local_view(resolver: TFConfigClusterResolver, config: Mapping[str, object]) -> ClusterView:
    role, index = resolver.task_type or ALONE.role, resolver.task_id or ALONE.index
    if (role, index) != ALONE:
        raise ConfigError(
            "TF_CONFIG: without a cluster, task.type must be WORKER ('worker') and task.index 0, got "
            f"{role!r} and {index}; add 'cluster', or leave out 'task'"
        )
    return ClusterView(
        task=ALONE,
        is_chief=True,
        num_worker_replicas=1,
        global_id_in_cluster=0,
        master=_text(config, "session_master"),
        evaluation_master=_text(config, "eval_session_master"),
        service=_service(config),
    )


def _evaluator_view(
    cluster: ClusterSpec, resolver: TFConfigClusterResolver, config: Mapping[str, object]
) -> ClusterView:
    if resolver.task_id is None:
        raise ConfigError("TF_CONFIG: 'task.index' is missing; expected 0 for the evaluator")
    return ClusterView(
        task=TaskId(Role.EVALUATOR, resolver.task_id),
        evaluation_master=_text(config, "eval_session_master"),
        service=_service(config),
        lacks_chief=not cluster.tasks(Role.CHIEF),
    )


def _only_roles(cluster: ClusterSpec) -> ClusterSpec:
    jobs = {job: tasks for job, tasks in cluster.as_dict().items() if _is_role(job)}
    return ClusterSpec.one_view(jobs) if cluster.is_one_view else ClusterSpec(jobs)


def _is_role(job: str | None) -> bool:
    return job in tuple(Role)


def _foreign_task(cluster: ClusterSpec, job: str | None, index: int | None) -> TaskId:
    """Return the id of this process if its job is not a role."""
    if job is None or index is None:
        raise ConfigError(f"TF_CONFIG: 'task.index' is missing; expected the index of this task of job {job!r}")
    cluster.task_address(job, index)
    return TaskId(cast("Role", job), index)  # not a role: the word is only shown


def _check_chiefs(cluster: ClusterSpec) -> None:
    if (count := len(cluster.tasks(Role.CHIEF))) > 1:
        raise ConfigError(f"TF_CONFIG: the cluster must have only one chief, got {count}; make the others workers")


def _tasks_by_global_id(cluster: ClusterSpec) -> list[TaskId]:
    others = sorted(job for job in cluster.jobs if job not in (Role.CHIEF, Role.PS))
    jobs = [cast("Role", job) for job in (Role.CHIEF, *others, Role.PS)]
    return [task for job in jobs for task in cluster.tasks(job)]


def _text(config: Mapping[str, object], key: str) -> str:
    value = config.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"TF_CONFIG: {key!r}: expected a string, got {value!r}")
    return value


def _service(config: Mapping[str, object]) -> Mapping[str, object] | None:
    service = config.get("service")
    if service is not None and not isinstance(service, dict):
        raise TypeError(f"TF_CONFIG: 'service': expected a JSON object, got {service!r}")
    return service
