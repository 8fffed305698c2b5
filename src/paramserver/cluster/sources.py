"""Where the cluster of this process is described: in TF_CONFIG, or by the engine that has started the process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from paramserver.cluster import environment
from paramserver.cluster.jobset import JobSetClusterResolver
from paramserver.cluster.ray import RUN_VARIABLE, RayClusterResolver
from paramserver.cluster.resolver import ClusterResolver
from paramserver.cluster.roles import find_task
from paramserver.cluster.slurm import SlurmClusterResolver
from paramserver.cluster.spec import ClusterSpec, expected_one_of
from paramserver.cluster.task import TaskId
from paramserver.cluster.tf_config import TFConfigClusterResolver, named_task
from paramserver.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One source of clusters.

    Attributes:
        name: Its name on the command line.
        variable: The environment variable that shows that this process was started by it.
        resolver: Makes its resolver.
    """

    name: str
    variable: str
    resolver: Callable[[], ClusterResolver]


SOURCES = (
    Source("tf-config", "TF_CONFIG", TFConfigClusterResolver),
    Source("ray", RUN_VARIABLE, RayClusterResolver),
    Source("tf-config-file", "PARAMSERVER_TF_CONFIG_FILE", TFConfigClusterResolver),
    Source("jobset", "JOBSET_NAME", JobSetClusterResolver),
    Source("slurm", "SLURM_STEP_ID", SlurmClusterResolver),
)
"""All sources; the first one whose variable is set describes the cluster. TF_CONFIG is first: a user has written it."""


def resolve(name: str | None = None) -> ClusterResolver:
    """Return the resolver of the cluster that this process belongs to, and log why it is that one.

    Args:
        name: The name of a source; by default the first of `SOURCES` whose environment variable is set.

    Returns:
        The resolver; without any source that of TF_CONFIG, whose cluster is empty: the process is alone.

    Raises:
        ConfigError: If there is no source of that name, or it cannot know the cluster here.
    """
    source, why = find_source(name)
    logger.info("%s", why)
    return source.resolver()


def find_source(name: str | None = None) -> tuple[Source, str]:
    """Return the source that `resolve` uses, and why it does, for a log.

    Raises:
        ConfigError: If there is no source of that name.
    """
    by_name = {source.name: source for source in SOURCES}
    if name is not None:
        if name not in by_name:
            raise ConfigError(f"cluster: {expected_one_of(by_name, name)}")
        return by_name[name], f"the cluster is that of {name}, which was asked for"
    for source in SOURCES:
        if environment.is_set(source.variable):
            return source, f"the cluster is that of {source.name}, because {source.variable} is set"
    variables = ", ".join(source.variable for source in SOURCES)
    return SOURCES[0], f"this process is alone, because none of {variables} is set"


def own_task(resolver: ClusterResolver) -> tuple[ClusterSpec, TaskId]:
    """Return a resolver's cluster and the task of this process, for a process that is nothing else.

    Raises:
        ConfigError: If the resolver does not know the cluster or the task, or the cluster lacks the task.
    """
    if isinstance(resolver, TFConfigClusterResolver):
        return named_task()
    task_type, cluster = resolver.task_type, resolver.cluster_spec()
    if not cluster or task_type is None:
        raise ConfigError(f"cluster: {resolver!r} does not know which task of a cluster this process is")
    return cluster, find_task(cluster, task_type, resolver.task_id or 0)
