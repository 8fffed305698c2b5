"""The cluster of a run: its tasks, their addresses, and the task of this process. No torch here."""

from paramserver.cluster.jobset import JobSetClusterResolver
from paramserver.cluster.ray import RayClusterResolver
from paramserver.cluster.resolver import (
    ClusterResolver,
    DuplicateTaskError,
    SimpleClusterResolver,
    UnionClusterResolver,
    format_master_url,
)
from paramserver.cluster.roles import (
    collective_leader,
    coordination_leader,
    find_task,
    id_in_cluster,
    is_chief,
    normalize_cluster_spec,
    parse_role,
    validate_cluster,
    worker_count,
)
from paramserver.cluster.slurm import SlurmClusterResolver
from paramserver.cluster.sources import own_task, resolve
from paramserver.cluster.spec import ClusterDef, ClusterLike, ClusterSpec
from paramserver.cluster.task import Role, TaskId
from paramserver.cluster.tf_config import (
    TFConfigClusterResolver,
    as_tf_config,
    load_tf_config,
    named_task,
    server_task,
    task_name,
)

__all__ = [
    "ClusterDef",
    "ClusterLike",
    "ClusterResolver",
    "ClusterSpec",
    "DuplicateTaskError",
    "JobSetClusterResolver",
    "RayClusterResolver",
    "Role",
    "SimpleClusterResolver",
    "SlurmClusterResolver",
    "TFConfigClusterResolver",
    "TaskId",
    "UnionClusterResolver",
    "as_tf_config",
    "collective_leader",
    "coordination_leader",
    "find_task",
    "format_master_url",
    "id_in_cluster",
    "is_chief",
    "load_tf_config",
    "named_task",
    "normalize_cluster_spec",
    "own_task",
    "parse_role",
    "resolve",
    "server_task",
    "task_name",
    "validate_cluster",
    "worker_count",
]
