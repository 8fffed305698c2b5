"""What came of a run of the demo, from the reports of its tasks."""

from __future__ import annotations

from rich.table import Table

from paramserver.launch.progress import RunProgress

SHOWN_PATHS = {"checkpoint": "last checkpoint", "summaries": "TensorBoard files", "export": "exported model"}


def evaluations(progress: RunProgress) -> Table:
    """A line for each evaluation."""
    table = Table("step", "accuracy", "loss")
    for column in table.columns:
        column.justify = "right"
    for metrics in progress.evaluations:
        table.add_row(f"{metrics['global_step']:.0f}", f"{metrics['accuracy']:.3f}", f"{metrics['loss']:.4f}")
    return table


def results(progress: RunProgress) -> list[tuple[str, str]]:
    """Title and text of each result. In no table, because a path must not be cut to fit one."""
    updates = [f"{name} {task.updates}" for name, task in progress.tasks.items() if task.updates is not None]
    found = [("global steps/s", f"{progress.pace.overall:,.0f}"), ("updates applied", ", ".join(updates))]
    if progress.evaluations:
        found.insert(0, ("test accuracy", f"{progress.evaluations[-1]['accuracy']:.3f}"))
    counted = progress.tasks.get("ps:0")
    if counted and counted.mean_staleness is not None:
        found.append(("staleness", f"mean {counted.mean_staleness:.2f}, largest {counted.largest_staleness}"))
    return found + [(title, progress.paths[key]) for key, title in SHOWN_PATHS.items() if key in progress.paths]
