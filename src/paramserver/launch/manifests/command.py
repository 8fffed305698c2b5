"""``paramserver manifest``: options in, YAML out."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer

from paramserver.cluster.jobset import PORT
from paramserver.launch.manifests import KINDS, manifest
from paramserver.launch.manifests.options import PODS, RESTART_WITH, ManifestOptions, parse_resources

app = typer.Typer(
    help="Print a manifest for Kubernetes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

HELP = {
    "jobset": "Print a JobSet: a replicated job for each role.",
    "trainer": "Print a TrainJob of Kubeflow Trainer 2 and its runtime.",
    "tfjob": "Print a TFJob for Kubeflow's training operator.",
    "volcano": "Print a Job of Volcano with its plug-in tensorflow.",
}


def print_manifest(
    context: typer.Context,
    image: Annotated[str, typer.Option(metavar="NAME", help="The image of all pods.")],
    script: Annotated[str, typer.Argument(help="The program to train with, as the image has it.")],
    args: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    is_module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module, as for python -m.")
    ] = False,
    ps: Annotated[int, typer.Option(metavar="N", help="Parameter servers.")] = 1,
    workers: Annotated[int, typer.Option(metavar="N", help="Tasks that train, including the chief.")] = 1,
    evaluator: Annotated[bool, typer.Option("--evaluator", help="An evaluator, too.")] = False,
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the run, and first part of all names.")] = "train",
    namespace: Annotated[str | None, typer.Option(metavar="NAME", help="Namespace (default: kubectl's).")] = None,
    port: Annotated[int, typer.Option(metavar="N", help="Port of each ps.")] = PORT,
    restarts: Annotated[int, typer.Option(metavar="N", help="Start a task that fails again, up to N times.")] = 3,
    restart_with: Annotated[
        str,
        typer.Option(
            metavar="|".join(RESTART_WITH),
            help="pods: a task's Job makes a new pod. jobs: JobSet makes a new Job; needs JobSet 0.12 with the "
            "feature gate RestartJob.",
        ),
    ] = PODS,
    resources: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ROLE:]NAME=QUANTITY,...",
            help="Such as ps:cpu=2,memory=8Gi; may be given several times (default: cpu=2,memory=4Gi).",
        ),
    ] = None,
    pvc: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="PersistentVolumeClaim that chief and evaluator mount at /model."),
    ] = None,
    model_dir: Annotated[
        str | None, typer.Option(metavar="URL", help="Value of MODEL_DIR, for $(MODEL_DIR) in ARGS.")
    ] = None,
    shutdown_timeout: Annotated[
        int, typer.Option(metavar="SECONDS", help="Time for a task that is told to end, to save for example.")
    ] = 30,
    with_secret: Annotated[bool, typer.Option("--with-secret", help="Print a Secret with a new token, too.")] = False,
) -> None:
    """Print the manifest that the options ask for."""
    options = ManifestOptions(
        image=image,
        script=script,
        args=tuple(args or ()),
        is_module=is_module,
        ps=ps,
        workers=workers,
        evaluator=evaluator,
        name=name,
        namespace=namespace,
        port=port,
        restarts=restarts,
        restart_with=restart_with,
        resources=parse_resources(resources or ()),
        pvc=pvc,
        model_dir=model_dir,
        shutdown_timeout=shutdown_timeout,
        token=secrets.token_hex(32) if with_secret else None,
    )
    typer.echo(manifest(context.info_name or "", options), nl=False)


for _kind in KINDS:
    # Arguments after SCRIPT belong to the script, even if they look like options.
    app.command(
        _kind,
        help=f"{HELP[_kind]} Every pod runs `paramserver task SCRIPT ARGS`.",
        context_settings={"allow_interspersed_args": False},
    )(print_manifest)
