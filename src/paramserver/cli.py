"""The command line: options in, one call, exit code out.

Commands import their modules inside the function, because importing torch takes seconds, and ``launch`` and ``--help``
do not need it.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from paramserver.errors import ConfigError, ParameterServerError
from paramserver.launch.spec import LaunchOptions

app = typer.Typer(
    help="Parameter-server training for PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would keep the line ends of docstrings, so that long texts look wrong
    context_settings={"help_option_names": ["-h", "--help"]},
)

Lane = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Lane: auto (shared memory on one host, else TCP), shared-memory, tcp, or an installed one.",
    ),
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
    script: Annotated[str, typer.Argument(help="The program to train with.")],
    args: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    ps: Annotated[int, typer.Option(metavar="N", help="Parameter servers.")] = 1,
    workers: Annotated[int, typer.Option(metavar="N", help="Tasks that train, including the chief.")] = 1,
    evaluator: Annotated[bool, typer.Option("--evaluator", help="Start an evaluator, too.")] = False,
    lane: Lane = "auto",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="CPU threads per task (default: cores / workers)."),
    ] = None,
    restarts: Annotated[int, typer.Option(metavar="N", help="Start each task that fails again, up to N times.")] = 0,
    start_method: Annotated[
        str,
        typer.Option(
            metavar="forkserver|spawn",
            help="forkserver: tasks are forks of one process that has imported torch; spawn: each imports it itself.",
        ),
    ] = "forkserver",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started.")] = False,
) -> None:
    """Run SCRIPT as a cluster of processes on this machine.

    Chief, workers and evaluator run the script; parameter servers run the standard server. Every line of
    output begins with the name of its task; on a terminal, a display below the lines shows the progress.
    Ctrl-C stops all tasks. The exit code is that of the first task that failed.
    """
    from paramserver.launch import local
    from paramserver.launch.display import launch_displayed

    options = LaunchOptions(
        script=script,
        args=tuple(args or ()),
        ps=ps,
        workers=workers,
        evaluator=evaluator,
        lane=lane,
        threads=threads,
        restarts=restarts,
        start_method=start_method,
    )
    if not Path(script).is_file():
        raise ConfigError(f"launch: there is no script {script!r} in {Path.cwd()}")
    if dry_run:
        typer.echo(local.dry_run(options), nl=False)
    else:
        raise typer.Exit(launch_displayed(options))


@app.command()
def server(
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on any address, even if there is no token: everyone may connect.")
    ] = False,
) -> None:
    """Serve as the ps task that TF_CONFIG names.

    Ends by itself when the run is over. Without PARAMSERVER_TOKEN or PARAMSERVER_TOKEN_FILE, only a loopback address is
    listened on.
    """
    from paramserver.cluster import server_task

    server_task()  # shows faults of TF_CONFIG at once, and not only after the import of torch
    from paramserver.server.server import run_standard_server

    run_standard_server(insecure=insecure)


@app.command()
def inspect(checkpoint: Annotated[str, typer.Argument(help="Path or URL of the checkpoint.")]) -> None:
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
        list[str] | None, typer.Argument(help="host:port of each ps (default: the ps tasks in TF_CONFIG).")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Time to try to reach all of them.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the contents and counters of parameter servers.

    Asks the ps tasks of a running run, whose PARAMSERVER_TOKEN must be set. Load is the size of the values,
    relative to the mean of the tasks shown; staleness counts updates by other workers.
    """
    from paramserver.observe import status as run_status

    statuses = run_status.ask(run_status.find_targets(addresses or ()), timeout)
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
    from paramserver.demo.run import run_demo

    raise typer.Exit(run_demo(steps=steps, model_dir=model_dir, lane=lane))
