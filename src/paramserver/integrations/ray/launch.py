"""Runs on Ray from Python: of a script, as by ``paramserver launch --on ray``, or of a function."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from paramserver.cluster import environment
from paramserver.errors import ParameterServerError
from paramserver.launch import ray_cluster
from paramserver.launch.lifecycle import Limits
from paramserver.launch.ray import RayRun, Work, plan
from paramserver.launch.ray_options import RayOptions
from paramserver.launch.spec import RAY, LaunchOptions
from paramserver.layout.lanes import check_platform


def launch(
    program: str | Path | Callable[..., object],
    args: Sequence[object] = (),
    *,
    ps: int = 1,
    workers: int = 1,
    evaluator: bool = False,
    restarts: int = 0,
    ray: RayOptions | None = None,
    **options: object,
) -> int | Mapping[str, object]:
    """Run a script or a function as a cluster of tasks on Ray, and wait for its end.

    This process is connected to Ray unless it is already. Ctrl-C ends the run. Main thread only.

    Args:
        program: The path of a script, which runs as processes of its own on the nodes; or a function, which runs in the
            actor of each task that trains or evaluates. Inside of both, ``ps.ParameterServerStrategy()`` finds the
            cluster.
        args: The arguments of the program: texts for a script, any objects that Ray can send for a function.
        ps: Number of parameter servers.
        workers: Number of tasks that train, including the chief.
        evaluator: Whether to start an evaluator, too.
        restarts: Number of times that a task is started again.
        ray: Resources, placement and address.
        **options: Other options of the command, such as ``lane`` or ``threads``.

    Returns:
        The exit code of a script; the results of a function by task, such as ``{"chief:0": 1, "worker:0": 2}``.

    Raises:
        ConfigError: If Ray has no cluster, or no place for the tasks.
        ParameterServerError: If a task that runs the function has died. An error of the function itself is raised as
            it is.
    """
    check_platform("launch")
    is_function = callable(program)
    spec = plan(
        LaunchOptions(
            script=getattr(program, "__qualname__", "function") if callable(program) else str(program),
            args=() if is_function else tuple(map(str, args)),
            on=RAY,
            ps=ps,
            workers=workers,
            evaluator=evaluator,
            limits=Limits(restarts=restarts),
            ray=ray,
            **options,  # type: ignore[arg-type]  # checked there
        ),
        environment.read().token or secrets.token_hex(16),
        secrets.token_hex(4),
    )
    work = Work(program, tuple(args)) if callable(program) else None
    with ray_cluster.connected(spec.options, shows_output=is_function):
        run = RayRun(spec, work=work)
        code = run.run()
    if work is None:
        return code
    if code:
        raise run.error or ParameterServerError(f"launch: {run.summary or repr(run)}")
    return {str(task): run.results[task] for task in spec.tasks if task in run.results}
