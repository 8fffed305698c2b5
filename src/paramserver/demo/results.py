"""The results of a run of the demo, from the reports of its tasks."""

from __future__ import annotations

from rich.table import Table

from paramserver.launch.progress import RunProgress

OF_A_WORKER = ("computing", "reducing", "blocked")
OF_A_PS = ("sending", "waiting", "applying")
SHOWN_PATHS = {"checkpoint": "last checkpoint", "summaries": "TensorBoard files", "export": "exported model"}


def evaluations(progress: RunProgress) -> Table:
    """Return a table with a line for each evaluation."""
    table = Table("step", "accuracy", "loss")
    for column in table.columns:
        column.justify = "right"
    for metrics in progress.evaluations:
        table.add_row(f"{metrics['global_step']:.0f}", f"{metrics['accuracy']:.3f}", f"{metrics['loss']:.4f}")
    return table


def times(progress: RunProgress) -> Table:
    """Return the parts of a step in milliseconds: a line for each worker and ps."""
    table = Table("task", *OF_A_WORKER, "ps", *OF_A_PS, box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.justify = "left" if column.header in ("task", "ps") else "right"
    for name, task in progress.tasks.items():
        spent = {what: f"{seconds * 1e3:.3f}" for what, seconds in (task.step_seconds or {}).items()}
        own = [name, *(spent.get(what, "") for what in OF_A_WORKER)]
        for server in progress.tasks:
            if f"{server}/{OF_A_PS[0]}" in spent:
                table.add_row(*own, server, *(spent[f"{server}/{what}"] for what in OF_A_PS))
                own = [""] * len(own)
    return table


def results(progress: RunProgress) -> list[tuple[str, str]]:
    """Return title and text of each result. Not as a table, because a path must not be cut to fit into one."""
    updates = [f"{name} {task.updates}" for name, task in progress.tasks.items() if task.updates is not None]
    found = [("global steps/s", f"{progress.pace.overall:,.0f}"), ("updates applied", ", ".join(updates))]
    if progress.evaluations:
        found.insert(0, ("test accuracy", f"{progress.evaluations[-1]['accuracy']:.3f}"))
    counted = progress.tasks.get("ps:0")
    if counted and counted.mean_staleness is not None:
        found.append(("staleness", f"mean {counted.mean_staleness:.2f}, largest {counted.largest_staleness}"))
    return found + [(title, progress.paths[key]) for key, title in SHOWN_PATHS.items() if key in progress.paths]
