"""A run to be started, as data: options -> plan -> text. No process, socket, clock or environment here."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paramserver.cluster.logs import check_format, check_level
from paramserver.cluster.task import Role, TaskId
from paramserver.cluster.tf_config import as_tf_config
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Limits
from paramserver.launch.ray_options import RayOptions
from paramserver.layout.lanes import check_lane

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables for the number of threads that torch uses for one operator."""

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SPIN_COUNT = "10000"
"""How often such a thread looks for more work before it sleeps: for some 10 microseconds. The default of milliseconds
would keep a ps from the core that a worker waits for."""

WAIT_VARIABLES = (SPIN_VARIABLE, "OMP_WAIT_POLICY")
"""Environment variables that determine how these threads wait."""

MALLOC_VARIABLE = "GLIBC_TUNABLES"
MALLOC_TUNABLES = "glibc.malloc.tcache_count=0"
"""glibc caches small freed blocks for each thread, even those between two activations. The freed memory around a cached
block then never merges, nor fits other activations of its size. Without this cache, a worker holds half as much freed
memory, and is as fast."""

LEFT_ALONE = (*THREAD_VARIABLES, *WAIT_VARIABLES, MALLOC_VARIABLE)
"""Environment variables that keep the value of the user, if there is one."""

INHERITED = ("PARAMSERVER_LISTEN_FD", "PARAMSERVER_REPORT_FD", "PARAMSERVER_FORK_SERVER_FD")
"""Environment variables that hold the numbers of a process's inherited descriptors."""

START_METHODS = ("forkserver", "spawn")
"""Named as in multiprocessing: tasks are forks of one process that has imported torch, or import it themselves."""

PRELOADED = (
    "torch",
    "torch._dynamo",  # imported by torch with the first optimizer, which takes a second
    "paramserver.server",
    "paramserver.distribute.parameter_server",
    "paramserver.estimator",
)
"""Modules to import before tasks are forked."""

LOCAL = "local"
"""Name of the backend that starts the tasks on this machine."""

RAY = "ray"
"""Name of the backend that starts the tasks as actors of Ray."""

HOST = "127.0.0.1"

NO_ADDRESS = f"{HOST}:0"
"""Address in TF_CONFIG of a chief or worker, which needs an entry there, but listens on nothing."""

NO_PORT = "<free port>"
"""Text for a port that is chosen when the run starts."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """The options of a launch.

    Attributes:
        script: The program that chief, workers and evaluator run.
        args: The arguments of the script.
        is_module: Whether ``script`` is the name of a module, as for ``python -m``.
        on: Where the tasks run: a name of `launch.backends`.
        ps: Number of parameter servers.
        workers: Number of tasks that train, including the chief.
        evaluator: Whether to start an evaluator, too.
        lane: A name from `layout.lanes`: ``auto``, or ``tcp`` to avoid shared memory.
        threads: Threads for the computations of each task; None shares the cores among chief and workers.
        limits: The limits of the run's end, and of restarts.
        start_method: One of `START_METHODS`.
        heartbeat_timeout: Seconds after which a silent task counts as lost; None for the environment's.
        log_level: The least level of the tasks' logs, one of `cluster.logs.LEVELS`; None for the environment's.
        log_format: One of `cluster.logs.FORMATS`; None for the environment's. With ``json``, each line of output is an
            object.
        log_dir: A folder for a file with the output of each task; None for none.
        preload: With ``forkserver``, the modules to import before tasks are forked.
        ray: The options of Ray; None for the defaults.
    """

    script: str
    args: tuple[str, ...] = ()
    is_module: bool = False
    on: str = LOCAL
    ps: int = 1
    workers: int = 1
    evaluator: bool = False
    lane: str = "auto"
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
    start_method: str = "forkserver"
    heartbeat_timeout: float | None = None
    log_level: str | None = None
    log_format: str | None = None
    log_dir: Path | None = None
    preload: tuple[str, ...] = PRELOADED
    ray: RayOptions | None = None

    def __post_init__(self) -> None:
        if not self.script:
            raise ConfigError("launch: expected the path of a script, got an empty one")
        _check_least("ps", self.ps, "the variables live on parameter servers, so a run needs one")
        _check_least("workers", self.workers, "the chief counts as a worker, so 1 means a chief alone")
        if self.threads is not None:
            _check_least("threads", self.threads, "leave it out to share the cores among the workers")
        check_lane(self.lane, "lane")
        if self.heartbeat_timeout is not None and not self.heartbeat_timeout >= 0:
            raise ConfigError(f"heartbeat timeout: expected seconds, 0 or more, got {self.heartbeat_timeout}")
        if self.log_level is not None:
            check_level(self.log_level, "log level")
        if self.log_format is not None:
            check_format(self.log_format, "log format")
        if self.start_method not in START_METHODS:
            raise ConfigError(f"start method: expected one of {', '.join(START_METHODS)}, got {self.start_method!r}")
        if self.ray is not None and self.on != RAY:
            raise ConfigError(f"launch --on {self.on}: the options of Ray are for --on ray only; leave them out")
        _check_least("restarts", self.limits.restarts, "0 starts no task again", least=0)
        for name in ("grace", "shutdown_timeout", "restart_window"):
            if not getattr(self.limits, name) >= 0:
                raise ConfigError(f"{name}: expected seconds, 0 or more, got {getattr(self.limits, name)}")


@dataclass(frozen=True)
class TaskSpec:
    """One process to start.

    Attributes:
        task: The task.
        command: Program and arguments.
        env: Additions to the launcher's own environment.
    """

    task: TaskId
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LaunchSpec:
    """A whole run, ready to be started or shown.

    Attributes:
        run_id: Distinguishes this run from others in the same model_dir.
        tasks: The tasks in starting order; ps tasks first, so that workers find them.
        addresses: The cluster as in TF_CONFIG, role -> addresses.
        limits: As in `LaunchOptions`.
        start_method: As in `LaunchOptions`; for "forkserver" each command is ``PYTHON -m MODULE ARGUMENTS...``.
        preload: As in `LaunchOptions`.
        run_file: The file by which the run is found; None for none.
    """

    run_id: str
    tasks: tuple[TaskSpec, ...]
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    start_method: str = "spawn"
    preload: tuple[str, ...] = ()
    run_file: Path | None = None


def plan(
    options: LaunchOptions,
    ps_ports: Sequence[int | None],
    token: str,
    run_id: str,
    cores: int,
    already_set: Collection[str] = (),
    python: str = sys.executable,
    run_file: Path | None = None,
) -> LaunchSpec:
    """Return the run that ``options`` ask for, on this machine.

    Args:
        options: The options of the user.
        ps_ports: The listening port of each ps; None if it is not chosen yet, as in a dry run.
        token: The secret of the run.
        run_id: The id of the run.
        cores: Number of cores to share, such as `cores.usable_cores` finds.
        already_set: Those of `LEFT_ALONE` that the user has set.
        python: The interpreter for the tasks.
        run_file: The file by which the run is found; None for none.

    Raises:
        ConfigError: If the number of ports differs from that of ps tasks.
    """
    if len(ps_ports) != options.ps:
        raise ConfigError(f"ps_ports: expected {options.ps}, one for each ps, got {len(ps_ports)}")
    addresses = _addresses(options.workers, ps_ports)
    shared = {
        "PARAMSERVER_TOKEN": token,
        "PARAMSERVER_RUN_ID": run_id,
        "PARAMSERVER_LANE": options.lane,
        **option_variables(options),
        "PYTHONUNBUFFERED": "1",
        **({} if run_file is None else {"PARAMSERVER_RUN_FILE": str(run_file)}),
        **runtime_variables(options, cores, already_set),
    }
    tasks = tuple(
        TaskSpec(
            task,
            (python, *task_program(task, options)),
            {"TF_CONFIG": as_tf_config(addresses, task), **shared},
        )
        for task in task_ids(options)
    )
    return LaunchSpec(
        run_id,
        tasks,
        addresses,
        limits=options.limits,
        start_method=options.start_method,
        preload=options.preload,
        run_file=run_file,
    )


def runtime_variables(options: LaunchOptions, cores: int, already_set: Collection[str] = ()) -> dict[str, str]:
    """Return the environment variables for torch's threads and the C library; for the arguments see `plan`."""
    variables = _thread_variables(options, cores, already_set)
    if not set(WAIT_VARIABLES) & set(already_set):
        variables[SPIN_VARIABLE] = SPIN_COUNT
    if MALLOC_VARIABLE not in already_set:
        variables[MALLOC_VARIABLE] = MALLOC_TUNABLES
    return variables


def option_variables(options: LaunchOptions) -> dict[str, str]:
    """Return the environment variables for the options that replace the environment's where they are given."""
    given = {
        "PARAMSERVER_HEARTBEAT_TIMEOUT": options.heartbeat_timeout,
        "PARAMSERVER_LOG_LEVEL": options.log_level,
        "PARAMSERVER_LOG_FORMAT": options.log_format,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def task_ids(options: LaunchOptions) -> list[TaskId]:
    """Return the tasks of a run in starting order."""
    tasks = [TaskId(Role.PS, index) for index in range(options.ps)]
    tasks.append(TaskId(Role.CHIEF, 0))
    tasks += [TaskId(Role.WORKER, index) for index in range(options.workers - 1)]
    if options.evaluator:
        tasks.append(TaskId(Role.EVALUATOR, 0))
    return tasks


def task_program(task: TaskId, options: LaunchOptions) -> tuple[str, ...]:
    """Return the arguments that make an interpreter a task."""
    # A ps gets its update rules from the chief by name and numbers, so it never needs the user's script.
    if task.role is Role.PS:
        return ("-m", "paramserver", "server")
    script = ("-m", options.script) if options.is_module else (options.script,)
    return ("-m", "paramserver.launch.task", *script, *options.args)


def shared_environment(spec: LaunchSpec) -> dict[str, str]:
    """Return the environment variables that are equal for all tasks."""
    first, *others = [task.env for task in spec.tasks]
    return {name: value for name, value in first.items() if all(env.get(name) == value for env in others)}


def describe(spec: LaunchSpec) -> str:
    """Describe what would be started: a block for each task that a shell could run unchanged, except for the token."""
    count = len(spec.tasks)
    title = f"run {spec.run_id}: {count} {'task' if count == 1 else 'tasks'}"
    return "\n\n".join([title, *(_describe_task(spec, task) for task in spec.tasks)]) + "\n"


def _describe_task(spec: LaunchSpec, task: TaskSpec) -> str:
    title = f"# {task.task}"
    if task.task.role is Role.PS and Role.PS in spec.addresses:
        title += f", listening on {spec.addresses[Role.PS][task.task.index]}"
    shown = {name: "***" if name == "PARAMSERVER_TOKEN" else value for name, value in task.env.items()}
    lines = [f"{name}={shlex.quote(value)} \\" for name, value in shown.items()]
    return "\n".join([title, *lines, shlex.join(task.command)])


def _check_least(name: str, value: int, why: str, least: int = 1) -> None:
    if value < least:
        raise ConfigError(f"{name}: expected {least} or more, got {value}; {why}")


def _addresses(workers: int, ps_ports: Sequence[int | None]) -> dict[str, tuple[str, ...]]:
    # The evaluator is a task outside the cluster: no task connects to it or counts it.
    addresses: dict[str, tuple[str, ...]] = {Role.CHIEF.value: (NO_ADDRESS,)}
    if workers > 1:
        addresses[Role.WORKER.value] = (NO_ADDRESS,) * (workers - 1)
    ports = (NO_PORT if port is None else port for port in ps_ports)
    addresses[Role.PS.value] = tuple(f"{HOST}:{port}" for port in ports)
    return addresses


def _thread_variables(options: LaunchOptions, cores: int, already_set: Collection[str]) -> dict[str, str]:
    if options.threads is not None:
        return dict.fromkeys(THREAD_VARIABLES, str(options.threads))
    if "OMP_NUM_THREADS" in already_set:
        return {}  # MKL uses OMP's number if it has none of its own
    # The ps tasks are not counted, because they work while the workers wait for them.
    share = str(max(1, cores // options.workers))
    return {name: share for name in THREAD_VARIABLES if name not in already_set}
