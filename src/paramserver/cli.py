"""The command line: options in, one call, exit code out.

Commands import their modules inside the function, because importing torch takes seconds, and ``launch`` and ``--help``
do not need it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from paramserver.cluster import environment, logs
from paramserver.cluster.exit_codes import exit_code
from paramserver.cluster.sources import SOURCES, find_source
from paramserver.errors import ConfigError, ParameterServerError
from paramserver.launch.backends import BACKENDS, load
from paramserver.launch.jobsets.options import JobSetOptions, parse_mounts
from paramserver.launch.lifecycle import Limits
from paramserver.launch.manifests import command as manifests
from paramserver.launch.ray_options import STRATEGIES, RayOptions, parse_resources
from paramserver.launch.spec import LOCAL, RAY, LaunchOptions, option_variables
from paramserver.layout.lanes import AUTO, check_platform


def _listed(title: str, variables: Iterable[tuple[str, str]]) -> str:
    """Return a list of environment variables that fits in 80 columns, for the end of the help."""
    lines = [f"{title}:"]
    for name, text in variables:
        lines += textwrap.wrap(f"{name:<30} {text}", width=76, initial_indent="  ", subsequent_indent=" " * 33)
    return "\b\n" + "\n".join(lines)  # \b: the lines stay as they are


ENVIRONMENT = "\n\n".join(
    (
        _listed("Environment variables", environment.FOR_USERS),
        _listed("Set by launch, unless they are set already", environment.DEFAULTS_OF_LAUNCH),
        _listed("Set by launchers for their tasks", environment.FROM_LAUNCHERS),
    )
)

logger = logging.getLogger(__name__)

app = typer.Typer(
    help="Parameter-server training for PyTorch.",
    epilog=ENVIRONMENT,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would keep the line ends of docstrings, so that long texts look wrong
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(manifests.app, name="manifest")

Lane = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Lane: auto (shared memory on one host, else TCP), shared-memory, tcp, or an installed one.",
    ),
]


LogLevel = Annotated[
    str | None, typer.Option(metavar="|".join(logs.LEVELS), help="Least level of the log (default: info).")
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="|".join(logs.FORMATS), help="json: each line is an object (default: text).")
]

WITH_MANIFEST = ("manifest", "name", "mount", "start_method", "log_format", "log_dir", "dry_run")
"""Options of launch for a run of a manifest."""

HeartbeatTimeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Time after which a silent task counts as lost (default: 30)."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen on any address, even if there is no token: everyone may connect.")
]


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    try:
        app(prog_name="paramserver")
    except ParameterServerError as exc:
        typer.echo(f"error: {exc}", err=True)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("paramserver")
        except importlib.metadata.PackageNotFoundError:
            version = "(run from its sources, not installed)"
        typer.echo(f"paramserver {version}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# Arguments after SCRIPT belong to the script, even if they look like options of the launcher.
@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    context: typer.Context,
    script: Annotated[str | None, typer.Argument(help="The program to train with.")] = None,
    args: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    is_module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module, as for python -m.")
    ] = False,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Run the JobSet of a manifest for Kubernetes, instead of SCRIPT."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the JobSet, if FILE has several.")] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=FOLDER", help="Folder here that stands for a volume's path in the pods of FILE."),
    ] = None,
    on: Annotated[
        str, typer.Option(metavar="|".join(BACKENDS), help="Where the tasks run (default: on this machine).")
    ] = LOCAL,
    ps: Annotated[int, typer.Option(metavar="N", help="Parameter servers.")] = 1,
    workers: Annotated[int, typer.Option(metavar="N", help="Tasks that train, including the chief.")] = 1,
    evaluator: Annotated[bool, typer.Option("--evaluator", help="Start an evaluator, too.")] = False,
    lane: Lane = "auto",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="CPU threads per task (default: cores / workers)."),
    ] = None,
    restarts: Annotated[
        int, typer.Option(metavar="N", help="Start each task that fails again, up to N times in a restart window.")
    ] = 0,
    restart_window: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time after which a failure does not count any more.")
    ] = 3600.0,
    shutdown_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time for a task that is told to end, to save for example.")
    ] = 30.0,
    start_method: Annotated[
        str,
        typer.Option(
            metavar="forkserver|spawn",
            help="forkserver: tasks are forks of one process that has imported torch; spawn: each imports it itself.",
        ),
    ] = "forkserver",
    heartbeat_timeout: HeartbeatTimeout = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    log_dir: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder for a file with the output of each task.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started.")] = False,
    ps_resources: Annotated[
        str | None, typer.Option(metavar="RESOURCES", help="Ray: resources of each ps (default: CPU=1).")
    ] = None,
    worker_resources: Annotated[
        str | None,
        typer.Option(metavar="RESOURCES", help="Ray: resources of each other task, such as CPU=2,GPU=1,memory=4GiB."),
    ] = None,
    placement: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Ray: {', '.join(STRATEGIES)} (default: SPREAD).")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ray: the cluster (default: RAY_ADDRESS, or the one that runs here)."),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Ray: a folder to copy to all nodes, in which the tasks run."),
    ] = None,
    start_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Ray: time to wait for resources (default: 60).")
    ] = None,
) -> None:
    """Run SCRIPT as a cluster of processes, here or on an engine.

    Chief, workers and evaluator run the script; parameter servers run the standard server. Every line of
    output begins with the name of its task; on a terminal, a display below the lines shows the progress.
    The tasks' standard input is empty. Ctrl-C stops all tasks, ps tasks last. The exit code is that of the
    first task that failed of its own.
    """
    check_platform("launch")  # before the import of what other systems lack
    from paramserver.launch.display import launch_displayed

    if manifest is not None:
        jobset = JobSetOptions(
            path=manifest,
            name=name,
            mounts=parse_mounts(mount or ()),
            start_method=start_method,
            log_format=log_format,
            log_dir=log_dir,
        )
        _check_given(context)
        _launch_manifest(jobset, script, dry_run=dry_run)
    if script is None:
        raise typer.BadParameter("Missing argument SCRIPT, or --manifest FILE.")
    options = LaunchOptions(
        script=script,
        args=tuple(args or ()),
        ps=ps,
        workers=workers,
        evaluator=evaluator,
        lane=lane,
        threads=threads,
        limits=Limits(restarts=restarts, restart_window=restart_window, shutdown_timeout=shutdown_timeout),
        start_method=start_method,
        is_module=is_module,
        on=on,
        heartbeat_timeout=heartbeat_timeout,
        log_level=log_level,
        log_format=log_format,
        log_dir=log_dir,
        ray=_ray_options(
            on,
            ps_resources=ps_resources,
            worker_resources=worker_resources,
            placement=placement,
            address=address,
            working_dir=working_dir,
            start_timeout=start_timeout,
        ),
    )
    backend = load(on)
    if not is_module and not Path(script).is_file():
        raise ConfigError(f"launch: there is no script {script!r} in {Path.cwd()}")
    if dry_run:
        typer.echo(backend.dry_run(options), nl=False)
    else:
        raise typer.Exit(launch_displayed(options))


def _ray_options(on: str, **values: Any) -> RayOptions | None:
    """Return the options of Ray among those that are given; None without any."""
    given = {name: value for name, value in values.items() if value is not None}
    if given and on != RAY:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"launch --on {on}: {names}: an option of --on ray; leave it out, or add --on ray")
    for name in given.keys() & {"ps_resources", "worker_resources"}:
        given[name] = parse_resources(given[name], f"--{name.replace('_', '-')}")
    return RayOptions(**given) if given else None


def _check_given(context: typer.Context) -> None:
    """Refuse options that would be ignored because the manifest says what they say."""
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    if ignored := sorted(given - {"script", "args", *WITH_MANIFEST}):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise ConfigError(f"launch --manifest: the manifest says what {options} would; leave it out")


def _launch_manifest(options: JobSetOptions, script: str | None, *, dry_run: bool) -> NoReturn:
    from paramserver.launch.display import displayed
    from paramserver.launch.jobsets import run

    if script is not None:
        raise ConfigError(f"launch: expected SCRIPT or --manifest FILE, got both: {script!r} and '{options.path}'")
    jobset = run.read(options)
    if dry_run:
        typer.echo(run.dry_run(jobset, options), nl=False)
        raise typer.Exit
    start = partial(run.launch, jobset, options)
    raise typer.Exit(displayed(run.tasks(jobset), start, log_format=options.log_format, log_dir=options.log_dir))


@app.command(context_settings={"allow_interspersed_args": False})
def task(
    script: Annotated[str, typer.Argument(help="The program to train with; a ps does not need it.")],
    args: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    is_module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module, as for python -m.")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(source.name for source in SOURCES),
            help="What describes the cluster (default: the first one that is there).",
        ),
    ] = None,
    lane: Annotated[
        str | None, typer.Option(metavar="NAME", help="Lane, as for launch (default: PARAMSERVER_LANE, or auto).")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads (default: usable cores).")] = None,
    insecure: Insecure = False,
    heartbeat_timeout: HeartbeatTimeout = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Be the task that TF_CONFIG or an engine names, on any host.

    A ps serves, as the command server does. Chief, workers and evaluator run SCRIPT; the exit code is the script's.
    SIGTERM ends both in good order, with code 143. The usable cores are those of the process's affinity within the CPU
    quota of its control group; OMP_NUM_THREADS and GLIBC_TUNABLES are set unless they are set already.
    """
    check_platform("task")
    from paramserver.cluster import Role, TFConfigClusterResolver, as_tf_config, own_task
    from paramserver.launch import own_process
    from paramserver.launch import task as task_script

    options = LaunchOptions(
        script=script,
        args=tuple(args or ()),
        is_module=is_module,
        lane=lane or AUTO,
        threads=threads,
        heartbeat_timeout=heartbeat_timeout,
        log_level=log_level,
        log_format=log_format,
    )
    source, why = find_source(cluster)
    resolver = source.resolver()
    known, me = own_task(resolver)
    settings = {**option_variables(options), **({"PARAMSERVER_LANE": lane} if lane else {})}
    if not isinstance(resolver, TFConfigClusterResolver):
        _set_up_logs(str(me), log_level, log_format)
        logger.info("%s", why)
        settings["TF_CONFIG"] = as_tf_config(known, me)  # what the script and the server read
        if resolver.linger and not environment.is_set("PARAMSERVER_LINGER"):
            settings["PARAMSERVER_LINGER"] = f"{resolver.linger:g}"
    own_process.prepare(options, settings)
    if me.role is Role.PS:
        _serve(insecure=insecure)
    else:
        sys.exit(task_script.main([*(["-m"] if is_module else []), script, *options.args]))


@app.command()
def server(insecure: Insecure = False, log_level: LogLevel = None, log_format: LogFormat = None) -> None:
    """Serve as the ps task that TF_CONFIG names.

    Ends by itself when the run is over. Without PARAMSERVER_TOKEN or PARAMSERVER_TOKEN_FILE, only a loopback address is
    listened on.
    """
    _serve(insecure=insecure, log_level=log_level, log_format=log_format)


def _set_up_logs(task: str, log_level: str | None, log_format: str | None) -> None:
    surroundings = environment.read()
    level, form = log_level or surroundings.log_level, log_format or surroundings.log_format
    logs.check_level(level, "--log-level")
    logs.check_format(form, "--log-format")
    logs.set_up(task, level, form, names_task=surroundings.run_file is None)


def _serve(*, insecure: bool, log_level: str | None = None, log_format: str | None = None) -> None:
    from paramserver.cluster import server_task

    _, me = server_task()  # shows faults of TF_CONFIG at once, and not only after the import of torch
    _set_up_logs(str(me), log_level, log_format)
    from paramserver.server.server import run_standard_server

    try:
        run_standard_server(insecure=insecure)
    except ParameterServerError as exc:
        typer.echo(f"error: {exc}", err=True)
        raise typer.Exit(exit_code(exc)) from exc


@app.command()
def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Path or URL of a checkpoint, or of a model_dir for its latest one."),
    ],
) -> None:
    """Show the variables of a checkpoint.

    Prints its global step and each variable's type, shape and size.
    """
    from paramserver.estimator.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(checkpoint)
    table = Table("variable", "dtype", "shape")
    table.add_column("size", justify="right")
    for name, dtype, shape, num_bytes in found.variables:
        extent = " x ".join(map(str, shape)) or "scalar"
        table.add_row(name, str(dtype).removeprefix("torch."), extent, decimal(num_bytes))
    table.columns[0].overflow = "fold"  # a cut name could not be used
    console = Console(highlight=False, markup=False)
    console.print(f"{found.path}: step {found.step}", soft_wrap=True)
    console.print(table)
    console.print(f"slots: {', '.join(found.slots) or 'none'}")


@app.command()
def status(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN|ADDRESSES", help="host:port of each ps, or the id of a launched run."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Time to try to reach all of them.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the contents and counters of parameter servers.

    Without arguments, asks the ps tasks of TF_CONFIG, or else of the run that was launched on this machine by this
    user. Addresses need the run's PARAMSERVER_TOKEN. Load is the size of the values, relative to the mean of the tasks
    shown; staleness counts updates by other workers.
    """
    from paramserver.observe import status as run_status

    found = run_status.find_run(addresses or ())
    statuses = run_status.ask(found.targets, timeout, found.token)
    if as_json:
        typer.echo(run_status.as_json(statuses))
        return
    console = Console(highlight=False, markup=False)
    console.print(run_status.as_table(statuses))
    console.print(f"global step: {statuses[0].global_step:,}")


@app.command()
def demo(
    steps: Annotated[int, typer.Option(metavar="N", help="Global steps to train.")] = 10_000,
    model_dir: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder for results (default: a new temporary one).")
    ] = None,
    lane: Lane = "auto",
) -> None:
    """Train on bundled data with five processes.

    Chief, worker, two parameter servers and an evaluator train a classifier of handwritten digits.
    """
    check_platform("demo")
    from paramserver.demo.run import run_demo

    raise typer.Exit(run_demo(steps=steps, model_dir=model_dir, lane=lane))
