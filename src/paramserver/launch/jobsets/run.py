"""A run of a JobSet on this machine: planned, started, restarted by its failure policy, ended by its success policy."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path

from paramserver.cluster import environment, run_file
from paramserver.cluster.jobset import VARIABLES
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.backends import OnEnd, OnOutput, OnReport
from paramserver.launch.cores import usable_cores
from paramserver.launch.jobsets.jobset import JobSet
from paramserver.launch.jobsets.options import JobSetOptions
from paramserver.launch.jobsets.pods import TOKEN, Machine, plan
from paramserver.launch.jobsets.policy import JobSetLifecycle
from paramserver.launch.jobsets.reading import read_jobset
from paramserver.launch.lifecycle import Limits
from paramserver.launch.local import LocalRun, listener
from paramserver.launch.output import OutputLine
from paramserver.launch.spec import (
    LEFT_ALONE,
    PRELOADED,
    LaunchOptions,
    LaunchSpec,
    describe,
    runtime_variables,
)
from paramserver.layout.lanes import check_platform

GRACE = 3.0
"""Seconds that ps tasks get to end by themselves after chief and workers have ended; JobSet would stop them at once."""


def read(options: JobSetOptions) -> JobSet:
    """Return the JobSet to run.

    Raises:
        ConfigError: As for `read_jobset`, or if there is no folder for a volume.
    """
    jobset = read_jobset(options.path, options.name)
    for job in jobset.jobs:
        for path in job.mounts:
            folder = options.mounts.get(path.rstrip("/"), path)
            if not Path(folder).is_dir():
                raise ConfigError(
                    f"{options.path}: replicated job {job.name!r}: a volume is mounted at {path!r}, and there is no "
                    f"folder {folder!r} on this machine; make it, or name another one: --mount {path}=FOLDER"
                )
    return jobset


def tasks(jobset: JobSet) -> list[TaskId]:
    """Return the tasks of a JobSet in starting order."""
    return [pod.task for pod in jobset.pods()]


def dry_run(jobset: JobSet, options: JobSetOptions) -> str:
    """Return a description of exactly what `launch` would start. Starts nothing.

    Raises:
        ConfigError: As for `plan`.
    """
    count = sum(task.role is Role.PS for task in tasks(jobset))
    spec = _plan(jobset, options, "<run id>", "***", [None] * count)
    left_out = f"\n{_left_out(jobset)}\n" if jobset.left_out else ""
    return f"JobSet {jobset.name}, {describe(spec)}{left_out}"


def launch(
    jobset: JobSet,
    options: JobSetOptions,
    on_report: OnReport | None,
    on_output: OnOutput,
    on_end: OnEnd | None = None,
) -> int:
    """Run a JobSet, wait for its end, leave nothing behind, and return the exit code; see `Backend.launch`.

    Raises:
        ConfigError: As for `plan`, or if a task cannot be started, or this system is not Linux.
    """
    check_platform("launch")
    environment.drop(("TF_CONFIG", "PARAMSERVER_TF_CONFIG_FILE", *VARIABLES))  # no pod has those of this shell
    run_id, token = secrets.token_hex(4), secrets.token_hex(16)
    if jobset.left_out:
        on_output(OutputLine(None, _left_out(jobset), is_error=True))
    restarts = 0
    while True:
        lifecycle = JobSetLifecycle(jobset, _limits(jobset), restarts)
        with contextlib.ExitStack() as stack:
            sockets = {task: stack.enter_context(listener()) for task in tasks(jobset) if task.role is Role.PS}
            ports = [sock.getsockname()[1] for sock in sockets.values()]
            spec = _plan(jobset, options, run_id, token, ports)
            path = _write_run_file(spec, options)
            stack.callback(run_file.remove, path)
            code = LocalRun(spec, on_report, on_output, sockets, on_end, lifecycle).run()
        if not lifecycle.is_restarting or lifecycle.interrupt is not None:
            return code
        restarts = lifecycle.restarts


def _plan(jobset: JobSet, options: JobSetOptions, run_id: str, token: str, ports: list[int | None]) -> LaunchSpec:
    workers = sum(task.role.trains for task in tasks(jobset))
    already_set = [name for name in LEFT_ALONE if environment.is_set(name)]
    runtime = runtime_variables(LaunchOptions(script=jobset.name, workers=workers), usable_cores(), already_set)
    machine = Machine(
        run_id=run_id,
        token=token,
        python=sys.executable,
        ports=ports,
        runtime=runtime,
        mounts=options.mounts,
        environment=environment.for_child({}),
    )
    spec = plan(jobset, machine, _limits(jobset))
    method = "spawn" if options.start_method == "spawn" else spec.start_method
    return replace(spec, start_method=method, preload=PRELOADED)


def _write_run_file(spec: LaunchSpec, options: JobSetOptions) -> Path:
    """Write the file by which `paramserver status` finds the run. As in pods, the tasks do not know it."""
    first = spec.tasks[0]
    run = run_file.Run(
        run_id=spec.run_id,
        script=str(options.path),
        launcher=os.getpid(),
        ps=list(spec.addresses[Role.PS.value]),
        token=first.env.get(TOKEN, ""),
    )
    return run_file.write(run)


def _limits(jobset: JobSet) -> Limits:
    # Restarts are the JobSet's to count; one here keeps the ports of ps tasks that may be started again.
    return Limits(grace=GRACE, shutdown_timeout=max(job.grace for job in jobset.jobs), restarts=1)


def _left_out(jobset: JobSet) -> str:
    return f"not done on this machine: {', '.join(jobset.left_out)}"
