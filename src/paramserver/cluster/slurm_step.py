"""A step of Slurm as its tasks see it in their environment: which node each task is on. Pure.

Rules
    * All tasks of a step derive the same layout, each from its own variables. A task that finds itself on another node
      than the layout says refuses it.
    * ``SLURM_STEP_TASKS_PER_NODE`` counts tasks by node, in the order of ``SLURM_STEP_NODELIST``.
    * The distribution says which of them are on which node: ``block`` fills one node after the other, ``cyclic`` goes
      round. Others, such as ``plane``, are refused.
    * In a step over several components of a heterogeneous job, the tasks of a component are numbered after those of the
      components before. Its node list is sorted by name all the same, so that the components' own lists give the order.
    * Outside of a step, as in the script of a batch job, the variables of the job describe the step that srun would
      start without options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paramserver.cluster.hostlist import expand_counts, expand_hosts
from paramserver.errors import ConfigError

OUTSIDE = (
    "slurm: expected to be inside a job of Slurm, but {} is not set; "
    "start the tasks with srun, inside of salloc or sbatch"
)
DISTRIBUTIONS = ("block", "cyclic")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step.

    Attributes:
        job_id: The id of the job; that of the first component of a heterogeneous job; that of one element of an array.
        step_id: The id of the step within the job; 0 outside of a step.
        nodes: The node of each task, by the number of the task, ``SLURM_PROCID``.
        task: The number of this task; None if this process is no task of a step.
    """

    job_id: int
    step_id: int
    nodes: tuple[str, ...]
    task: int | None

    @property
    def name(self) -> str:
        """The name of the step, for messages, as Slurm shows it."""
        return f"step {self.job_id}.{self.step_id}"


def read_step(variables: Mapping[str, str]) -> Step:
    """Return the step that the variables of a task describe.

    Args:
        variables: The environment variables that begin with ``SLURM``.

    Raises:
        ConfigError: If this is no job of Slurm, a variable is malformed or missing, the variables contradict each
            other, or the distribution of the tasks is not known.
    """
    is_step = "SLURM_STEP_ID" in variables
    nodes = _layout(variables)
    step = Step(
        job_id=number_of(variables, "SLURM_JOB_ID"),
        step_id=number_of(variables, "SLURM_STEP_ID") if is_step else 0,
        nodes=nodes,
        task=number_of(variables, "SLURM_PROCID") if is_step else None,
    )
    if step.task is not None:
        _check_place(step, step.task, variables)
    return step


def lay_out(parts: Sequence[Mapping[str, int]], distribution: str) -> tuple[str, ...]:
    """Return the node of each task.

    Args:
        parts: For each component of the job, the number of tasks of each of its nodes.
        distribution: One of `DISTRIBUTIONS`.

    >>> lay_out([{"a": 2, "b": 1}], "block"), lay_out([{"a": 2, "b": 1}], "cyclic")
    (('a', 'a', 'b'), ('a', 'b', 'a'))
    """
    turns = [(part, turn, node) for part, counts in enumerate(parts) for node in counts for turn in range(counts[node])]
    if distribution == "cyclic":
        turns.sort(key=lambda each: each[:2])  # stable: the nodes of a turn keep their order
    return tuple(node for _, _, node in turns)


def _layout(variables: Mapping[str, str]) -> tuple[str, ...]:
    nodes_name = _first_set(variables, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    counts_name = _first_set(variables, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    nodes = expand_hosts(variables[nodes_name], nodes_name)
    counts = expand_counts(variables[counts_name], counts_name)
    if len(nodes) != len(counts):
        raise ConfigError(
            f"slurm: expected one number of tasks for each node, got {len(counts)} in {counts_name}="
            f"{variables[counts_name]} for {len(nodes)} nodes in {nodes_name}={variables[nodes_name]}"
        )
    layout = lay_out(_components(dict(zip(nodes, counts, strict=True)), variables), _distribution(variables))
    expected = variables.get("SLURM_STEP_NUM_TASKS", str(len(layout)))
    if expected != str(len(layout)):
        raise ConfigError(
            f"slurm: SLURM_STEP_NUM_TASKS is {expected}, but {counts_name}={variables[counts_name]} adds up to "
            f"{len(layout)}; start the tasks with srun, which sets both"
        )
    return layout


def _components(counts: Mapping[str, int], variables: Mapping[str, str]) -> list[dict[str, int]]:
    """Return the numbers of tasks by node of each component of the job; a job has one unless it is heterogeneous."""
    if "SLURM_HET_SIZE" not in variables:
        return [dict(counts)]
    parts = []
    for number in range(number_of(variables, "SLURM_HET_SIZE")):
        name = f"SLURM_JOB_NODELIST_HET_GROUP_{number}"
        nodes = expand_hosts(_text(variables, name), name)
        parts.append({node: counts[node] for node in nodes if node in counts})
    if missing := counts.keys() - {node for part in parts for node in part}:
        raise ConfigError(f"slurm: no component of the heterogeneous job has the nodes {sorted(missing)} of the step")
    return parts


def _distribution(variables: Mapping[str, str]) -> str:
    # As in "cyclic:block,NoPack": the first word is about nodes, the others are about what is inside of them.
    whole = variables.get("SLURM_DISTRIBUTION", "block")
    name = whole.replace(",", ":").partition(":")[0]
    if name not in DISTRIBUTIONS:
        raise ConfigError(
            f"slurm: expected tasks distributed by block or cyclic, got SLURM_DISTRIBUTION={whole}, of which a task "
            "cannot tell the nodes of the others; start the step with srun --distribution=cyclic"
        )
    return name


def _check_place(step: Step, task: int, variables: Mapping[str, str]) -> None:
    if task >= len(step.nodes):
        raise ConfigError(f"slurm: SLURM_PROCID is {task}, but {step.name} has {len(step.nodes)} tasks")
    node = variables.get("SLURMD_NODENAME", step.nodes[task])
    if node != step.nodes[task]:
        raise ConfigError(
            f"slurm: expected task {task} of {step.name} on {step.nodes[task]}, got {node}: the tasks are not "
            "distributed as SLURM_DISTRIBUTION says; start the step with srun --distribution=cyclic"
        )


def _first_set(variables: Mapping[str, str], *names: str) -> str:
    name = next((name for name in names if variables.get(name)), None)
    if name is None:
        raise ConfigError(OUTSIDE.format(" or ".join(names)))
    return name


def _text(variables: Mapping[str, str], name: str) -> str:
    if name not in variables:
        raise ConfigError(OUTSIDE.format(name))
    return variables[name]


def number_of(variables: Mapping[str, str], name: str) -> int:
    """Return the value of a variable, which is a number.

    Raises:
        ConfigError: If the variable is not set, or holds something else.
    """
    text = _text(variables, name)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"slurm: {name}: expected a number, got {text!r}")
    return int(text)
