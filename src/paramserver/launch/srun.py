"""A run as one step of Slurm, as data: options -> command and environment of srun; and srun's lines. Pure.

Rules
    * All tasks run the same command, ``paramserver task``: each learns its role from ``SLURM_PROCID``, and the number
      that srun puts before each line is that of a task.
    * The tasks go round the nodes (``--distribution=cyclic``), ps tasks first, so that these are on as many nodes as
      possible.
    * ``--overcommit``: several tasks may share a CPU, as a ps works while the workers wait for it. ``--overlap``: the
      step starts at once beside other steps of its allocation, such as an interactive shell, instead of waiting for
      their end.
    * ``--kill-on-bad-exit=0`` and ``--wait=0``: tasks end at different times, and a failed worker ends nobody.
    * In a heterogeneous job of two components, the ps tasks are on the first, the others on the second.
    * Secrets are in the environment only: other users can read a command line.
"""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from paramserver.cluster.hostlist import expand_hosts
from paramserver.cluster.slurm import JOBS_VARIABLE, show_jobs
from paramserver.cluster.slurm_step import number_of
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Ending
from paramserver.launch.output import OutputLine
from paramserver.launch.spec import THREAD_VARIABLES, LaunchOptions, option_variables, task_ids

OPTIONS = (
    "--distribution=cyclic",
    "--overcommit",
    "--overlap",
    "--kill-on-bad-exit=0",
    "--wait=0",
    "--label",
    "--input=none",
    "--mpi=none",
    "--export=ALL",  # a job that was submitted with --export=NONE would keep the token from the tasks
)

_LABELLED = re.compile(r" *(\d+): ?(.*)", re.DOTALL)
_ENDED = re.compile(r"srun: error: [^ ]+: tasks? ([\d,-]+): (.*)")
_EXITED = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}
CANCELLED = re.compile(r"(srun: Job step aborted|slurmstepd.*\*\*\* (STEP|JOB) .* CANCELLED)")
"""Lines that tell that Slurm has signalled the tasks."""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """A step, ready to be started or shown.

    Attributes:
        run_id: As in `LaunchSpec`.
        name: The name of the step, by which squeue finds it.
        job_ids: The ids of the job: one for each component.
        tasks: The tasks by the numbers that srun gives them.
        command: The program and its arguments.
        env: Additions to the launcher's environment; srun hands all of it to the tasks.
    """

    run_id: str
    name: str
    job_ids: tuple[str, ...]
    tasks: tuple[TaskId, ...]
    command: tuple[str, ...]
    env: Mapping[str, str]


def plan_step(
    options: LaunchOptions, variables: Mapping[str, str], token: str, run_id: str, python: str = sys.executable
) -> StepSpec:
    """Return the step that ``options`` ask for, inside the allocation that Slurm's variables describe.

    Raises:
        ConfigError: If the variables describe no allocation, or one with other than one or two components, or the
            options ask for what there is not.
    """
    if options.limits.restarts:
        raise ConfigError(
            f"launch --on slurm: --restarts: expected 0, got {options.limits.restarts}: Slurm starts no task of a step "
            "again; submit the job with --requeue, and let its script requeue it (docs/slurm.md)"
        )
    if "SLURM_JOB_ID" not in variables:
        raise ConfigError(
            "launch --on slurm: expected to be inside an allocation, but SLURM_JOB_ID is not set; run it in the script "
            "of an sbatch job, or under salloc, such as: salloc --ntasks=6 paramserver launch --on slurm --ps 2 ..."
        )
    tasks = tuple(task_ids(options))
    name = f"paramserver-{run_id}"
    jobs = {role.value: sum(task.role is role for task in tasks) for role in (Role.PS, Role.CHIEF, Role.WORKER)}
    jobs[Role.EVALUATOR.value] = int(options.evaluator)
    env = {
        "PARAMSERVER_TOKEN": token,
        "PARAMSERVER_RUN_ID": run_id,
        "PARAMSERVER_LANE": options.lane,
        JOBS_VARIABLE: show_jobs({job: count for job, count in jobs.items() if count}),
        **option_variables(options),
        **({} if options.threads is None else dict.fromkeys(THREAD_VARIABLES, str(options.threads))),
        "PYTHONUNBUFFERED": "1",
    }
    return StepSpec(
        run_id=run_id,
        name=name,
        job_ids=_job_ids(variables),
        tasks=tasks,
        command=_command(options, variables, name, python),
        env=env,
    )


def describe_step(spec: StepSpec) -> str:
    """Describe what would be started: lines that a shell could run unchanged, except for the token."""
    numbers = " ".join(f"{number}={task}" for number, task in enumerate(spec.tasks))
    shown = {name: "***" if name == "PARAMSERVER_TOKEN" else value for name, value in spec.env.items()}
    variables = [f"{name}={shlex.quote(value)} \\" for name, value in shown.items()]
    title = f"run {spec.run_id}: {len(spec.tasks)} tasks, one step of job {spec.job_ids[0]}"
    return "\n".join([title, "", f"# by SLURM_PROCID: {numbers}", *variables, shlex.join(spec.command)]) + "\n"


def advice(options: LaunchOptions, variables: Mapping[str, str]) -> str:
    """Return a line about what works, but is hardly meant; empty if there is nothing to say."""
    nodes = _num_nodes(variables)[0]
    if options.ps <= nodes:
        return ""
    return (
        f"{options.ps} ps tasks share {nodes} {'node' if nodes == 1 else 'nodes'}; more than one on a node is seldom "
        "faster: ask for more nodes, or for fewer ps tasks"
    )


def read_line(spec: StepSpec, line: str, is_error: bool) -> OutputLine:
    """Return a line of srun's output with the task that its number stands for."""
    match = _LABELLED.fullmatch(line)
    if match is None or int(match[1]) >= len(spec.tasks):
        return OutputLine(None, line, is_error)
    return OutputLine(spec.tasks[int(match[1])], match[2], is_error)


def read_endings(spec: StepSpec, line: str) -> list[tuple[TaskId, Ending]]:
    """Return the tasks whose failure a line of srun tells, and how they ended; tasks that end well are not told."""
    match = _ENDED.fullmatch(line)
    if match is None:
        return []
    numbers = [int(number) for number in expand_hosts(f"[{match[1]}]")]
    return [(spec.tasks[number], _ending(match[2])) for number in numbers if number < len(spec.tasks)]


def _ending(text: str) -> Ending:
    if match := _EXITED.match(text):
        return Ending(int(match[1]))
    number = next((number for name, number in _SIGNALS.items() if name and text.startswith(name)), None)
    return Ending(1) if number is None else Ending(128 + number, number)


def _command(options: LaunchOptions, variables: Mapping[str, str], name: str, python: str) -> tuple[str, ...]:
    script = ("-m", options.script) if options.is_module else (options.script,)
    program = (python, "-m", "paramserver", "task", "--cluster", "slurm", *script, *options.args)
    cpus = variables.get("SLURM_CPUS_PER_TASK")  # srun does not read it, except in some versions
    shared = (*OPTIONS, f"--job-name={name}", *([f"--cpus-per-task={cpus}"] if cpus else []))
    others = options.workers + options.evaluator
    nodes = _num_nodes(variables)
    if len(nodes) == 1:
        return ("srun", *_size(options.ps + others, nodes[0]), *shared, *program)
    first, second = (
        (f"--het-group={group}", *_size(count, nodes[group]), *shared, *program)
        for group, count in enumerate((options.ps, others))
    )
    return ("srun", *first, ":", *second)


def _size(num_tasks: int, num_nodes: int) -> tuple[str, str]:
    return f"--ntasks={num_tasks}", f"--nodes={min(num_tasks, num_nodes)}"


def _job_ids(variables: Mapping[str, str]) -> tuple[str, ...]:
    groups = range(len(_num_nodes(variables)))
    if len(groups) == 1:
        return (variables["SLURM_JOB_ID"],)
    return tuple(variables.get(f"SLURM_JOB_ID_HET_GROUP_{group}", variables["SLURM_JOB_ID"]) for group in groups)


def _num_nodes(variables: Mapping[str, str]) -> list[int]:
    """Return the number of nodes of each component of the job."""
    size = number_of({"SLURM_HET_SIZE": "1", **variables}, "SLURM_HET_SIZE")
    if size == 1:
        return [number_of({"SLURM_JOB_NUM_NODES": "1", **variables}, "SLURM_JOB_NUM_NODES")]
    if size != 2:  # one for ps tasks, and one for all others
        raise ConfigError(
            f"launch --on slurm: expected a job of one component, or of two (for ps tasks, and for all others), got "
            f"{size}; start the tasks by hand: srun --het-group=... paramserver task SCRIPT (docs/slurm.md)"
        )
    return [number_of(variables, f"SLURM_JOB_NUM_NODES_HET_GROUP_{group}") for group in range(size)]
