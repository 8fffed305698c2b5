"""A trainer of Ray Train whose workers train with parameter servers.

Rules
    * Rank 0 is the chief, the other ranks are workers; no evaluator.
    * The ps tasks are actors of their own, which begin and end with the group of workers. When a worker or a ps is
      lost, Ray Train starts the whole group again, as far as ``FailureConfig`` allows, and the loop goes on from
      ``ray.train.get_checkpoint()``, as its users know it.
    * The token reaches workers and ps tasks in calls.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from paramserver.cluster import environment
from paramserver.cluster.task import Role, TaskId
from paramserver.cluster.tf_config import as_tf_config
from paramserver.launch import ray_cluster
from paramserver.launch.ray import plan
from paramserver.launch.ray_host import call_and_leave
from paramserver.launch.ray_options import RayOptions
from paramserver.launch.ray_spec import RaySpec, cluster_of, not_placed
from paramserver.launch.spec import RAY, LaunchOptions

PREFIX = "PARAMSERVER_"


@dataclass(kw_only=True)
class ParameterServerConfig(BackendConfig):  # type: ignore[misc]  # Ray is not installed with the tools
    """The parameter servers of a trainer.

    Attributes:
        num_ps: Number of parameter servers.
        options: Their resources (``ps_resources``) and placement, and how long they may wait for it.
        lane: As for ``paramserver launch``.
    """

    num_ps: int = 1
    options: RayOptions = field(default_factory=RayOptions)
    lane: str = "auto"

    @property
    def backend_cls(self) -> type[ParameterServerBackend]:
        """The class that starts the servers."""
        return ParameterServerBackend


class ParameterServerTrainer(DataParallelTrainer):  # type: ignore[misc]  # as above
    """A ``DataParallelTrainer`` with parameter servers beside its workers.

    In the loop, ``ps.ParameterServerStrategy()`` finds the cluster. ``ray.train.report``, ``get_checkpoint`` and
    ``get_dataset_shard`` are those of Ray; every worker has to call ``report`` equally often.

    Args:
        train_loop_per_worker: The loop, as for all trainers of Ray.
        num_ps: Number of parameter servers.
        ps_resources: Resources of each of them; by default a CPU.
        backend_config: More about them; replaces ``num_ps`` and ``ps_resources``.
        **options: Those of ``DataParallelTrainer``: ``scaling_config``, ``run_config``, ``datasets``,
            ``train_loop_config`` and others.
    """

    def __init__(
        self,
        train_loop_per_worker: Callable[..., object],
        *,
        num_ps: int = 1,
        ps_resources: Mapping[str, float] | None = None,
        backend_config: ParameterServerConfig | None = None,
        **options: Any,
    ) -> None:
        ray_options = RayOptions() if ps_resources is None else RayOptions(ps_resources=ps_resources)
        config = backend_config or ParameterServerConfig(num_ps=num_ps, options=ray_options)
        super().__init__(leaving(train_loop_per_worker), backend_config=config, **options)


class ParameterServerBackend(Backend):  # type: ignore[misc]  # as above
    """Starts the servers before the workers train, and ends them with the group. Lives in the controller of a run."""

    def __init__(self) -> None:
        self._group: Any = None
        self._actors: list[ray_cluster.Actor] = []

    def on_start(self, worker_group: Any, backend_config: ParameterServerConfig) -> None:
        """Start the servers, and tell every worker the cluster and which task it is.

        Raises:
            ConfigError: If there is no place for the servers in time.
        """
        self.on_shutdown(worker_group, backend_config)  # of a group whose end was not awaited
        spec = _plan(backend_config, len(worker_group))
        cluster = cluster_of(spec.tasks, self._serve(spec))
        ranks = [actor for actor in spec.actors if actor.task.role.trains]
        for rank, actor in enumerate(ranks):
            variables = {name: value for name, value in actor.env.items() if name.startswith(PREFIX)}
            variables["TF_CONFIG"] = as_tf_config(cluster, actor.task)
            worker_group.execute_single(rank, environment.extend, variables)

    def on_shutdown(self, worker_group: Any, backend_config: ParameterServerConfig) -> None:
        """End the servers. Idempotent."""
        for actor in self._actors:
            ray_cluster.kill(actor)
        if self._group is not None:
            ray_cluster.remove(self._group)
        self._actors, self._group = [], None

    def _serve(self, spec: RaySpec) -> dict[TaskId, str]:
        """Start the servers, and return their addresses."""
        servers = replace(spec, actors=tuple(actor for actor in spec.actors if actor.task.role is Role.PS))
        self._group = ray_cluster.place(servers)
        if not self._group.wait(servers.options.start_timeout):
            raise not_placed(servers, ray_cluster.nodes())
        for number, actor in enumerate(servers.actors):
            name = ray_cluster.actor_name(spec, actor.task, 0)
            self._actors.append(ray_cluster.start_actor(actor, self._group, number, name, runs_function=False))
        found = ray.get([actor.listen.remote() for actor in self._actors])
        addresses = dict(zip(servers.tasks, found, strict=True))
        cluster = cluster_of(spec.tasks, addresses)
        for handle, actor in zip(self._actors, servers.actors, strict=True):
            ray.get(handle.start.remote(actor.arguments, as_tf_config(cluster, actor.task), None, False))
            handle.forward.remote()
        return addresses


def leaving(loop: Callable[..., object]) -> Callable[..., object]:
    """Return a loop after which the worker says goodbye to the servers: its process goes on."""

    @functools.wraps(loop)
    def run(*args: object) -> object:
        return call_and_leave(loop, *args)

    return run


def _plan(config: ParameterServerConfig, num_workers: int) -> RaySpec:
    options = LaunchOptions(
        script="train_loop_per_worker",
        on=RAY,
        ps=config.num_ps,
        workers=num_workers,
        lane=config.lane,
        ray=config.options,
    )
    return plan(options, secrets.token_hex(16), secrets.token_hex(4))
