"""The command line: options in, one call, exit code out.

Commands import what they run inside themselves: torch takes seconds to import, and ``launch`` and ``--help``
do without it.
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
    rich_markup_mode=None,  # it keeps the line ends of docstrings, so long texts look wrong
    context_settings={"help_option_names": ["-h", "--help"]},
)

Lane = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How bytes go: auto (shared memory on one host, else TCP), shared-memory, tcp, or an installed lane.",
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


# What follows SCRIPT is the script's, also where it looks like an option of ours.
@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    script: Annotated[str, typer.Argument(help="The program to train with.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    ps: Annotated[int, typer.Option(metavar="N", help="Parameter servers.")] = 1,
    workers: Annotated[int, typer.Option(metavar="N", help="Tasks that train, the chief included.")] = 1,
    evaluator: Annotated[bool, typer.Option("--evaluator", help="Start an evaluator, too.")] = False,
    lane: Lane = "auto",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads of each task; else the workers share the cores."),
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
    output is marked with the task that it comes from; on a terminal, a display below them shows how far the
    run is. Ctrl-C stops all. The exit code is that of the first task that failed.
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
def server() -> None:
    """Serve as the ps task that TF_CONFIG names.

    Ends by itself when the run is over.
    """
    from paramserver.cluster import server_task

    server_task()  # what is wrong with it shows at once, and not after torch is imported
    from paramserver.server.server import run_standard_server

    run_standard_server()


@app.command()
def inspect(checkpoint: Annotated[str, typer.Argument(help="Its path.")]) -> None:
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
    table.columns[0].overflow = "fold"  # a name that is cut is a name that cannot be used
    console = Console(highlight=False, markup=False)
    console.print(f"{found.path}: step {found.step}", soft_wrap=True)
    console.print(table)
    console.print(f"slots: {', '.join(found.slots) or 'none'}")


@app.command()
def status(
    addresses: Annotated[
        list[str] | None, typer.Argument(help="host:port of each; else the ps tasks of TF_CONFIG.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to try to reach them, in all.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what parameter servers hold and do.

    Asks those of a run that is going on, whose PARAMSERVER_TOKEN must be set. Load is the size of the values,
    relative to the mean of the tasks shown; staleness counts updates of others.
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
        str | None, typer.Option(metavar="PATH", help="Where to keep results; else a new directory.")
    ] = None,
    lane: Lane = "auto",
) -> None:
    """Train on bundled data with five processes.

    Chief, worker, two parameter servers and an evaluator train a classifier of handwritten digits.
    """
    from paramserver.demo.run import run_demo

    raise typer.Exit(run_demo(steps=steps, model_dir=model_dir, lane=lane))
