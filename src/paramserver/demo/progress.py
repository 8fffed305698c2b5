"""What a run looks like while it runs, and what came of it: from the reports of its tasks. No torch here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paramserver.cluster.report import Report

SHOWN_PATHS = {"checkpoint": "last checkpoint", "summaries": "TensorBoard files", "export": "exported model"}


@dataclass
class TaskProgress:
    """The newest report of each kind from one task."""

    state: str = "starting"
    global_step: int = 0
    steps_per_second: float | None = None
    loss: float | None = None
    updates: int | None = None
    mean_staleness: float | None = None
    largest_staleness: int | None = None


@dataclass
class RunProgress:
    """The state of a run, as its tasks report it.

    Attributes:
        tasks: By name, in the order in which they are shown.
        max_steps: The global step that the run goes to.
    """

    tasks: dict[str, TaskProgress]
    max_steps: int
    evaluations: list[dict[str, float]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    _began: tuple[float, int] | None = None
    _ended: tuple[float, int] | None = None

    def take(self, report: Report) -> None:
        """Take in one report."""
        task = self.tasks.setdefault(report.task, TaskProgress())
        for name in TaskProgress.__dataclass_fields__:
            value = getattr(report, name)
            if value is not None:
                setattr(task, name, value)
        self.paths.update(report.paths or {})
        if report.evaluation:
            self.evaluations.append(report.evaluation)
        if report.state == "training" and report.global_step is not None:
            moment = (time.monotonic(), report.global_step)
            self._began = self._began or moment
            self._ended = moment

    @property
    def global_step(self) -> int:
        """The highest step that any task has reported."""
        return max((task.global_step for task in self.tasks.values()), default=0)

    @property
    def steps_per_second(self) -> float:
        """Global steps per second over the whole training."""
        if self._began is None or self._ended is None or self._began == self._ended:
            return 0.0
        return (self._ended[1] - self._began[1]) / (self._ended[0] - self._began[0])

    def live(self) -> RenderableType:
        """The display while the run goes on; fits 80 columns."""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            "global step",
            ProgressBar(total=self.max_steps, completed=min(self.global_step, self.max_steps), width=28),
            f"{self.global_step} of {self.max_steps}",
            self._rate(),
        )
        tasks = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
        for title in ("task", "does"):
            tasks.add_column(title)
        for title in ("loss", "updates", "staleness"):
            tasks.add_column(title, justify="right")
        for name, task in self.tasks.items():
            tasks.add_row(name, task.state, _shown(task.loss, ".4f"), _shown(task.updates, "d"), _staleness(task))
        return Group(bar, tasks)

    def summary(self) -> RenderableType:
        """What came of the run, but for the `results`."""
        return Group(Text("Evaluations on the test images", style="bold"), self._evaluation_table())

    def results(self) -> list[tuple[str, str]]:
        """Title and text of each result. Apart from `summary`, because a path must not be cut to fit a table."""
        updates = [f"{name} {task.updates}" for name, task in self.tasks.items() if task.updates is not None]
        found = [("global steps/s", f"{self.steps_per_second:,.0f}"), ("updates applied", ", ".join(updates))]
        if self.evaluations:
            found.insert(0, ("test accuracy", f"{self.evaluations[-1]['accuracy']:.3f}"))
        counted = self.tasks.get("ps:0")
        if counted and counted.mean_staleness is not None:
            found.append(("staleness", f"mean {counted.mean_staleness:.2f}, largest {counted.largest_staleness}"))
        return found + [(title, self.paths[key]) for key, title in SHOWN_PATHS.items() if key in self.paths]

    def _rate(self) -> str:
        rates = [task.steps_per_second for task in self.tasks.values() if task.steps_per_second]
        return f"{max(rates):,.0f} steps/s" if rates else ""

    def _evaluation_table(self) -> Table:
        table = Table("step", "accuracy", "loss")
        for column in table.columns:
            column.justify = "right"
        for metrics in self.evaluations:
            table.add_row(f"{metrics['global_step']:.0f}", f"{metrics['accuracy']:.3f}", f"{metrics['loss']:.4f}")
        return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _staleness(task: TaskProgress) -> str:
    if task.mean_staleness is None:
        return ""
    return f"{task.mean_staleness:.2f} (max {task.largest_staleness})"
