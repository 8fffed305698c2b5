"""The progress of a run, from the reports of its tasks, and its display while the run goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

from paramserver.cluster.report import Report
from paramserver.cluster.task import TaskId
from paramserver.launch.lifecycle import Ending

WINDOW = 5.0
"""Seconds over which the displayed rate is averaged."""

LINE_INTERVAL = 30.0
"""Seconds between two lines of progress, where there is no display."""

OTHER_LINES = 4
"""Lines of the display beside those of tasks: a rule, the global step, the table's head, the number of hidden tasks."""


@dataclass
class TaskProgress:
    """The newest report of each kind from one task.

    Attributes:
        state: State of the task in words; of a task without reports, only this is known.
        step_seconds: Time that the parts of its steps take, reported after its last step.
        ending: How the task ended; None before that.
    """

    state: str = "running"
    global_step: int = 0
    loss: float | None = None
    updates: int | None = None
    mean_staleness: float | None = None
    largest_staleness: int | None = None
    step_seconds: dict[str, float] | None = None
    ending: Ending | None = None

    @property
    def doing(self) -> str:
        """The state of the task, or how it ended."""
        if self.ending is None:
            return self.state
        return str(self.ending) if self.ending.code else "ended"

    @property
    def staleness(self) -> str:
        """Staleness of the updates that a ps has applied, as text; empty if it is not known."""
        if self.mean_staleness is None:
            return ""
        return f"{self.mean_staleness:.2f} (max {self.largest_staleness})"


class Pace:
    """The speed of the global step.

    Args:
        clock: Returns seconds that never decrease.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None
        self._moments: deque[tuple[float, int]] = deque()

    def take(self, step: int) -> None:
        """Note the present global step. Counting begins with the first step that is not 0, such as a checkpoint's."""
        if step <= (self._moments[-1][1] if self._moments else 0):
            return
        now = self._clock()
        self._moments.append((now, step))
        self._began = self._began or self._moments[0]
        while self._moments[0][0] < now - WINDOW and len(self._moments) > 2:
            self._moments.popleft()

    @property
    def recent(self) -> float:
        """Global steps per second in the last `WINDOW` seconds; 0.0 if it is not known."""
        return self._rate(self._moments[0], self._clock()) if self._moments else 0.0

    @property
    def overall(self) -> float:
        """Global steps per second from the first step to the last; 0.0 if it is not known."""
        return self._rate(self._began, self._moments[-1][0]) if self._began else 0.0

    def _rate(self, since: tuple[float, int], now: float) -> float:
        then, step = since
        return (self._moments[-1][1] - step) / (now - then) if now > then else 0.0


@dataclass
class RunProgress:
    """The state of a run, as its tasks report it. Shown by `rich` as the lines of a display.

    One thread may change it while another one shows it.

    Attributes:
        tasks: The tasks by name, in the order of the display. Reports of other tasks are ignored.
        max_steps: The global step at which the run ends; None if it is not known.
        pace: The speed of the global step.
        evaluations: Metrics of each finished evaluation.
        paths: Paths of results by kind.
    """

    tasks: dict[str, TaskProgress]
    max_steps: int | None = None
    pace: Pace = field(default_factory=Pace)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tasks: Iterable[TaskId]) -> RunProgress:
        """Return the progress of a run that begins; tasks that train come first."""
        return cls({str(task): TaskProgress() for task in sorted(tasks, key=lambda task: not task.role.trains)})

    def take(self, report: Report) -> None:
        """Add one report."""
        task = self.tasks.get(report.task)
        if task is None:  # any process that the user's script starts may write into its pipe
            return
        for name in TaskProgress.__dataclass_fields__:
            value = getattr(report, name, None)
            if value is not None:
                setattr(task, name, value)
        self.max_steps = report.max_steps or self.max_steps
        self.paths.update(report.paths or {})
        if report.evaluation:
            self.evaluations.append(report.evaluation)
        self.pace.take(report.global_step or 0)

    def end(self, task: TaskId, ending: Ending) -> None:
        """Note that a task has ended for good."""
        self.tasks[str(task)].ending = ending

    @property
    def global_step(self) -> int:
        """The highest step that any task has reported."""
        return max((task.global_step for task in self.tasks.values()), default=0)

    @property
    def has_updated(self) -> bool | None:
        """Whether the ps tasks have applied any update; None if they have reported nothing."""
        counts = [task.updates for task in self.tasks.values() if task.updates is not None]
        return any(counts) if counts else None

    @property
    def line(self) -> str:
        """The progress in one line."""
        of = f" of {self.max_steps:,}" if self.max_steps else ""
        text = f"global step {self.global_step:,}{of}, {self.pace.recent:,.0f} steps/s"
        losses = [task.loss for task in self.tasks.values() if task.loss is not None]
        return f"{text}, loss {losses[0]:.4f}" if losses else text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style="dim")
        yield self._step_line()
        yield from self._task_lines(max(console.height // 2 - OTHER_LINES, 1))

    def _step_line(self) -> Table:
        """Return the global step with, if the last step is known, a progress bar in the rest of the line."""
        end, step = self.max_steps, self.global_step
        of = f" of {end:,}" if end else ""
        rate = f"  {self.pace.recent:,.0f} steps/s" if step else ""
        line = Table.grid(Column(no_wrap=True), Column(ratio=1), padding=(0, 2, 0, 0), expand=True)
        line.add_row(f"global step {step:,}{of}{rate}", ProgressBar(end, min(step, end)) if end else "")
        return line

    def _task_lines(self, limit: int) -> Iterable[Table | Text]:
        """Yield a table with a line for each task, at most ``limit``, and the number of the others."""
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
        table.add_column("task", no_wrap=True)
        table.add_column("does")
        for title in ("loss", "updates", "staleness"):
            table.add_column(title, justify="right", no_wrap=True)
        for name, task in list(self.tasks.items())[:limit]:
            # Rich first narrows a column that may wrap; with no_wrap, its text is then cut.
            doing = Text(task.doing, no_wrap=True, overflow="ellipsis")
            table.add_row(name, doing, _shown(task.loss, ".4f"), _shown(task.updates, ",d"), task.staleness)
        yield table
        if len(self.tasks) > limit:
            yield Text(f"and {len(self.tasks) - limit} more", style="dim")


class ProgressLines:
    """Says the progress of a run in a line every `LINE_INTERVAL` seconds in which it has made steps.

    Args:
        progress: The progress; `take` adds reports to it.
        say: Takes a line.
        clock: Returns seconds that never decrease.
    """

    def __init__(
        self, progress: RunProgress, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._say, self._clock = progress, say, clock
        self._due = clock() + LINE_INTERVAL
        self._said = 0

    def take(self, report: Report) -> None:
        """Add one report, and say the progress if it is time."""
        self._progress.take(report)
        step = self._progress.global_step
        if step > self._said and self._clock() >= self._due:
            self._said, self._due = step, self._clock() + LINE_INTERVAL
            self._say(self._progress.line)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
