"""A run on Ray, as data: options -> placement group and actors -> text; and the resources that are missing. Pure.

Rules
    * One placement group holds a bundle for each task, ps tasks first, and each task is an actor on its bundle. A
      bundle whose node is lost is placed anew by Ray, and with it the task that is started again.
    * Each actor holds a process: the same program as on one machine. Its environment is what is shown here, and a file
      with the cluster as it is at the moment (``PARAMSERVER_TF_CONFIG_FILE``).
    * The token goes to the actor in a call, and to the process by its environment. An environment of the actor itself
      (``runtime_env``) would be shown by Ray's dashboard.
    * The interpreter is that of the node.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from paramserver.cluster.ray import RUN_VARIABLE
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Limits
from paramserver.launch.ray_options import RayOptions, show_resources
from paramserver.launch.spec import (
    NO_ADDRESS,
    LaunchOptions,
    option_variables,
    runtime_variables,
    task_ids,
    task_program,
)

PYTHON = "python"
"""Text for the interpreter of a node."""


class Node(NamedTuple):
    """A node of a cluster.

    Attributes:
        name: Its address.
        total: Its resources by name.
    """

    name: str
    total: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ActorSpec:
    """One actor.

    Attributes:
        task: Its task.
        bundle: Its resources, which are those of its bundle.
        arguments: The arguments of the process's interpreter.
        env: Additions to the environment of the process.
    """

    task: TaskId
    bundle: Mapping[str, float]
    arguments: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RaySpec:
    """A run on Ray, ready to be started or shown.

    Attributes:
        run_id: As in `LaunchSpec`.
        name: The name of the placement group; the names of the actors begin with it.
        actors: The actors in the order of their bundles.
        options: The options of Ray.
        limits: As in `LaunchOptions`.
    """

    run_id: str
    name: str
    actors: tuple[ActorSpec, ...]
    options: RayOptions
    limits: Limits

    @property
    def tasks(self) -> tuple[TaskId, ...]:
        """The tasks in the order of their bundles."""
        return tuple(actor.task for actor in self.actors)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The bundles of the placement group."""
        return [dict(actor.bundle) for actor in self.actors]


def plan_actors(options: LaunchOptions, token: str, run_id: str, already_set: Collection[str] = ()) -> RaySpec:
    """Return the run on Ray that ``options`` ask for; for the other arguments see `spec.plan`."""
    ray = options.ray or RayOptions()
    name = f"paramserver-{run_id}"
    shared = {
        "PARAMSERVER_TOKEN": token,
        "PARAMSERVER_RUN_ID": run_id,
        "PARAMSERVER_LANE": options.lane,
        RUN_VARIABLE: name,
        **option_variables(options),
        "PYTHONUNBUFFERED": "1",
    }
    actors = []
    for task in task_ids(options):
        bundle = {name: amount for name, amount in _resources(ray, task).items() if amount}
        threads = options.threads or max(1, int(bundle.get("CPU", 1)))
        runtime = runtime_variables(replace(options, threads=threads), threads, already_set)
        arguments = task_program(task, options)
        actors.append(ActorSpec(task=task, bundle=bundle, arguments=arguments, env={**shared, **runtime}))
    return RaySpec(run_id=run_id, name=name, actors=tuple(actors), options=ray, limits=options.limits)


def cluster_of(tasks: Sequence[TaskId], ps_addresses: Mapping[TaskId, str]) -> dict[str, list[str]]:
    """Return the cluster as in TF_CONFIG; the evaluator is a task outside of it.

    >>> cluster_of([TaskId(Role.PS, 0), TaskId(Role.CHIEF, 0)], {TaskId(Role.PS, 0): "10.0.0.1:4711"})
    {'ps': ['10.0.0.1:4711'], 'chief': ['127.0.0.1:0']}
    """
    cluster: dict[str, list[str]] = {}
    for task in tasks:
        if task.role is not Role.EVALUATOR:
            cluster.setdefault(task.role.value, []).append(ps_addresses.get(task, NO_ADDRESS))
    return cluster


def describe_actors(spec: RaySpec) -> str:
    """Describe what would be started: the placement group, and the process of each actor as a shell would start it."""
    options = spec.options
    title = f"run {spec.run_id}: {len(spec.actors)} tasks as actors on Ray, cluster {options.address}"
    group = [f"# placement group {spec.name}, {options.placement}"]
    group += [f"{number}: {show_resources(actor.bundle)}" for number, actor in enumerate(spec.actors)]
    where = f"in a copy of {options.working_dir}" if options.working_dir else "in the folder of the launcher"
    actors = [_describe_actor(number, actor, where) for number, actor in enumerate(spec.actors)]
    return "\n\n".join([title, "\n".join(group), *actors]) + "\n"


def missing(bundles: Sequence[Mapping[str, float]], strategy: str, nodes: Sequence[Node]) -> str:
    """Return why the bundles do not fit into a cluster, were it idle; empty if they do, as far as can be told.

    >>> missing([{"CPU": 4.0}], "SPREAD", [Node("10.0.0.1", {"CPU": 2.0})])
    'no node has CPU=4, which a task needs'
    """
    for bundle in bundles:
        if not any(_fits(bundle, node.total) for node in nodes):
            return f"no node has {show_resources(bundle)}, which a task needs"
    if strategy == "STRICT_SPREAD" and len(bundles) > len(nodes):
        return f"{len(bundles)} tasks need {len(bundles)} nodes with STRICT_SPREAD, and there are {len(nodes)}"
    needed, there = _sum(bundles), _sum([node.total for node in nodes])
    lacking = {name: amount for name, amount in needed.items() if amount > there[name]}
    if lacking:
        has = {name: there[name] for name in lacking}
        return f"the tasks need {show_resources(lacking)} in all, and the nodes have {show_resources(has)}"
    return ""


def describe_need(spec: RaySpec, nodes: Sequence[Node]) -> str:
    """Return what the bundles need, and what each node has of that."""
    counts = Counter((actor.task.role.value, show_resources(actor.bundle)) for actor in spec.actors)
    needed = "; ".join(f"{count} x {role} {shown}" for (role, shown), count in counts.items())
    names = sorted({name for actor in spec.actors for name in actor.bundle})
    there = "; ".join(
        f"{node.name} {show_resources({name: node.total.get(name, 0.0) for name in names})}" for node in nodes
    )
    return f"needed: {needed} ({spec.options.placement}); there are: {there or 'no nodes'}"


def not_placed(spec: RaySpec, nodes: Sequence[Node]) -> ConfigError:
    """Return the error for a placement group that did not come up in time."""
    why = missing(spec.bundles, spec.options.placement, nodes) or "other runs have the resources"
    return ConfigError(
        f"launch --on ray: no place for the tasks within {spec.options.start_timeout:g} s: {why}; "
        f"{describe_need(spec, nodes)}. Ask for less (--ps-resources, --worker-resources, --placement), add nodes, or "
        "wait longer (--start-timeout)"
    )


def _resources(options: RayOptions, task: TaskId) -> Mapping[str, float]:
    return options.ps_resources if task.role is Role.PS else options.worker_resources


def _describe_actor(number: int, actor: ActorSpec, where: str) -> str:
    title = f"# {actor.task}, an actor on bundle {number}, {where}"
    shown = {name: "***" if name == "PARAMSERVER_TOKEN" else value for name, value in actor.env.items()}
    lines = [f"{name}={shlex.quote(value)} \\" for name, value in shown.items()]
    return "\n".join([title, *lines, shlex.join((PYTHON, *actor.arguments))])


def _fits(bundle: Mapping[str, float], total: Mapping[str, float]) -> bool:
    return all(total.get(name, 0.0) >= amount for name, amount in bundle.items())


def _sum(parts: Sequence[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
