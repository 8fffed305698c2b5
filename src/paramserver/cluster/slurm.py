"""The cluster of a step of Slurm: which of its tasks has which role, and where the ps tasks listen.

Rules
    * Tasks get their roles by ``SLURM_PROCID``, in the order of the jobs: with ``{"ps": 2, "chief": 1, "worker": 1}``
      tasks 0 and 1 are the ps tasks. Jobs without ``worker`` get the other tasks: a chief, unless they name one, and
      workers.
    * A ps listens on its node at the port base plus its index: nodes may be names of one machine.
    * The port base follows from the ids of job and step (`port_base_of`), so that runs on one node do not meet. Should
      two of them do so nevertheless, the second finds its port taken, and the token keeps their tasks apart.
    * The evaluator is a task outside the cluster, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from paramserver.cluster import environment
from paramserver.cluster.addresses import LAST_PORT
from paramserver.cluster.resolver import ClusterResolver, DescribedTask, format_master_url
from paramserver.cluster.roles import parse_role
from paramserver.cluster.slurm_step import Step, read_step
from paramserver.cluster.spec import ClusterSpec
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError

FIRST_PORT = 20_000
PORTS_OF_A_STEP = 16
NUM_BLOCKS = 751
"""Ports from 20000 to 32015: below those that Linux gives to outgoing connections. A prime number of blocks."""
STEPS_OF_A_JOB = 31
"""Distance between the blocks of two jobs with consecutive ids, in steps."""

JOBS_VARIABLE = "PARAMSERVER_SLURM_JOBS"
PORT_VARIABLE = "PARAMSERVER_SLURM_PORT_BASE"
DEFAULT_JOBS = "ps=1"

LINGER = 20.0
"""Less than the 30 seconds that Slurm leaves between SIGTERM and SIGKILL by default (KillWait)."""


class SlurmClusterResolver(ClusterResolver):
    """Reads the variables that Slurm sets for the tasks of a step, at every access.

    Args:
        jobs: Number of tasks by job, such as ``{"ps": 2, "chief": 1, "worker": 3}``, in the order of the tasks. Without
            ``worker``, the other tasks are a chief, unless one is named, and workers. By default the environment's
            ``PARAMSERVER_SLURM_JOBS``, or else one ps.
        port_base: The port of ps:0; that of ps:1 is the next one. By default the environment's
            ``PARAMSERVER_SLURM_PORT_BASE``, or else one that follows from the ids of job and step.
        rpc_layer: The protocol that `master` puts before an address.

    Every method and property that reads the environment raises ConfigError if this process is in no job of Slurm, a
    variable is malformed, or the jobs do not add up to the tasks of the step.
    """

    linger = LINGER

    def __init__(
        self, jobs: Mapping[str, int] | None = None, port_base: int | None = None, rpc_layer: str | None = None
    ) -> None:
        self._jobs = None if jobs is None else _checked_jobs(jobs, "jobs")
        self._port_base = port_base
        self.rpc_layer = rpc_layer

    def cluster_spec(self) -> ClusterSpec:
        """Return the cluster of the step, without the evaluator; outside of a step that of the job's first one."""
        step = self._step()
        return _cluster(step, self._tasks(step), self._find_port_base(step))

    def master(self, task_type: str | None = None, task_id: int | None = None, rpc_layer: str | None = None) -> str:
        """Return the address of a task, by default of this one.

        Raises:
            ConfigError: If the task is not in the cluster.
        """
        job = self.task_type if task_type is None else task_type
        index = self.task_id if task_id is None else task_id
        if job is None or index is None:
            raise ConfigError(f"master: expected a task, got task_type {job!r} and task_id {index!r}; pass both")
        address = self.cluster_spec().task_address(job, index)
        return format_master_url(address, self.rpc_layer if rpc_layer is None else rpc_layer)

    def _identify(self) -> DescribedTask:
        step = self._step()
        if step.task is None:
            raise ConfigError(
                f"slurm: this process is in job {step.job_id}, but it is no task of a step: expected SLURM_STEP_ID and "
                "SLURM_PROCID; start it with srun, such as: srun paramserver task train.py"
            )
        me = self._tasks(step)[step.task]
        return DescribedTask(me.role.value, me.index)

    def _step(self) -> Step:
        return read_step(environment.beginning_with("SLURM"))

    def _tasks(self, step: Step) -> list[TaskId]:
        jobs = self._jobs
        if jobs is None:
            jobs = parse_jobs(environment.read().slurm_jobs or DEFAULT_JOBS, JOBS_VARIABLE)
        return assign_roles(jobs, step)

    def _find_port_base(self, step: Step) -> int:
        port = self._port_base
        if port is None:
            port = _parse_port(environment.read().slurm_port_base)
        return port_base_of(step) if port is None else _checked_port(port)


def port_base_of(step: Step) -> int:
    """Return the port of ps:0: 20000 + 16 * ((31 * job id + step id) mod 751).

    >>> port_base_of(Step(job_id=1, step_id=0, nodes=("n1",), task=0))
    20496
    """
    block = (STEPS_OF_A_JOB * step.job_id + step.step_id) % NUM_BLOCKS
    return FIRST_PORT + PORTS_OF_A_STEP * block


def assign_roles(jobs: Mapping[str, int], step: Step) -> list[TaskId]:
    """Return the tasks of a cluster by ``SLURM_PROCID``.

    Raises:
        ConfigError: If the jobs do not add up to the tasks of the step, or none trains or serves.
    """
    counts, num_tasks = dict(jobs), len(step.nodes)
    if Role.WORKER not in counts and num_tasks > sum(counts.values()):
        counts.setdefault(Role.CHIEF.value, 1)
        counts[Role.WORKER.value] = num_tasks - sum(counts.values())
    trains = counts.get(Role.CHIEF, 0) + counts.get(Role.WORKER, 0)
    if sum(counts.values()) != num_tasks or not trains or not counts.get(Role.PS):
        raise ConfigError(
            f"slurm: expected a ps, a chief or worker, and {num_tasks} tasks in all, as {step.name} has on "
            f"{len(set(step.nodes))} nodes, got {show_jobs(jobs)}; give the step as many tasks as the jobs have "
            "(srun --ntasks), or change the jobs (PARAMSERVER_SLURM_JOBS). A step has fewer tasks than were asked for "
            "if its job was cut short"
        )
    return [TaskId(parse_role(job), index) for job, count in counts.items() for index in range(count)]


def parse_jobs(text: str, what: str) -> dict[str, int]:
    """Return the number of tasks by job.

    Raises:
        ConfigError: If the text is malformed, or a job is no role.

    >>> parse_jobs("ps=2,evaluator=1", "jobs")
    {'ps': 2, 'evaluator': 1}
    """
    jobs: dict[str, int] = {}
    for part in text.split(","):
        job, _, count = (each.strip() for each in part.partition("="))
        if not (count.isascii() and count.isdecimal()) or job in jobs:
            raise ConfigError(f"{what}: expected a number of tasks for each job, as 'ps=2,evaluator=1', got {text!r}")
        jobs[job] = int(count)
    return _checked_jobs(jobs, what)


def show_jobs(jobs: Mapping[str, int]) -> str:
    """Return jobs as `parse_jobs` takes them."""
    return ",".join(f"{job}={count}" for job, count in jobs.items())


def _parse_port(text: str) -> int | None:
    if text and not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{PORT_VARIABLE}: expected a port, got {text!r}")
    return int(text) if text else None


def _checked_port(port: int) -> int:
    if not 1 <= port <= LAST_PORT:
        raise ConfigError(f"slurm: port base: expected a port from 1 to {LAST_PORT}, got {port}")
    return port


def _checked_jobs(jobs: Mapping[str, int], what: str) -> dict[str, int]:
    for job, count in jobs.items():
        role = parse_role(job)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"{what}: {job}: expected a number of tasks, 0 or more, got {count!r}")
        if role in (Role.CHIEF, Role.EVALUATOR) and count > 1:
            raise ConfigError(f"{what}: expected at most one {role}, got {count}")
    return {parse_role(job).value: count for job, count in jobs.items()}


def _cluster(step: Step, tasks: list[TaskId], port_base: int) -> ClusterSpec:
    jobs: dict[str, list[str]] = {}
    for task, node in zip(tasks, step.nodes, strict=True):
        port = port_base + task.index if task.role is Role.PS else 0  # only ps tasks listen
        if task.role is not Role.EVALUATOR:
            jobs.setdefault(task.role.value, []).append(f"{node}:{port}")
    return ClusterSpec(jobs)
