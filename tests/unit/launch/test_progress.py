"""What a launched run shows while it goes on: 80 columns, a line for each task, and lines of tasks above."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from typing import TextIO

import pytest
from rich.console import Console

from paramserver.cluster.report import Report
from paramserver.cluster.task import Role, TaskId
from paramserver.launch import display
from paramserver.launch.display import Display, find_terminal
from paramserver.launch.lifecycle import Ending
from paramserver.launch.output import OutputLine
from paramserver.launch.progress import LINE_INTERVAL, WINDOW, Pace, ProgressLines, RunProgress
from paramserver.launch.spec import LaunchOptions, task_ids

CHIEF = TaskId(Role.CHIEF, 0)
WORKER = TaskId(Role.WORKER, 0)
TASKS = task_ids(LaunchOptions(script="train.py", ps=2, workers=2, evaluator=True))
CLEAR_LINE = "\x1b[2K"
SHOW_CURSOR = "\x1b[?25h"


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.TextIOWrapper):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        return True


def stream(kind: type[io.TextIOWrapper] = io.TextIOWrapper, encoding: str = "utf-8") -> io.TextIOWrapper:
    return kind(io.BytesIO(), encoding=encoding)


def lines_of(run: RunProgress, width: int = 80, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(run)
    return capture.get().splitlines()


def told(reports: Iterable[Report], tasks: Iterable[TaskId] = TASKS) -> RunProgress:
    run = RunProgress.of(tasks)
    for report in reports:
        run.take(report)
    return run


MIDDLE = (
    Report(task="chief:0", state="building the model", max_steps=10_000),
    Report(task="chief:0", state="training", global_step=100, loss=2.25),
    Report(task="chief:0", state="waiting for worker:0", global_step=9_999),
    Report(task="worker:0", state="training", global_step=10_001, loss=0.012345),
    Report(task="ps:0", state="serving", updates=10_001, mean_staleness=1.04, largest_staleness=137),
    Report(task="evaluator:0", state="evaluating ckpt-10000"),
)


def test_a_report_changes_what_it_names_and_nothing_else() -> None:
    chief = told(MIDDLE).tasks["chief:0"]
    assert (chief.state, chief.global_step, chief.loss) == ("waiting for worker:0", 9_999, 2.25)


def test_the_global_step_is_the_highest_that_was_heard_of() -> None:
    assert told(MIDDLE).global_step == 10_001


def test_there_is_a_line_for_each_task_those_who_train_first() -> None:
    rule, step, head, *tasks = lines_of(told(MIDDLE))
    assert set(rule) == {"─"}
    assert re.fullmatch(r"global step 10,001 of 10,000  [\d,]+ steps/s  ━+", step)
    assert head.split() == ["task", "does", "loss", "updates", "staleness"]
    assert [line.split()[0] for line in tasks] == ["chief:0", "worker:0", "ps:0", "ps:1", "evaluator:0"]
    assert tasks[2].split() == ["ps:0", "serving", "10,001", "1.04", "(max", "137)"]


def test_a_loop_of_ones_own_has_the_step_and_no_end_of_it() -> None:
    run = told([Report(task="ps:0", state="serving", global_step=470, updates=470)])
    assert lines_of(run)[1].rstrip() == "global step 470  0 steps/s"
    assert lines_of(run)[3].split() == ["chief:0", "running"]


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    names = ", ".join(f"worker:{index}" for index in range(100))
    run = told([*MIDDLE, Report(task="chief:0", state=f"waiting for {names}", updates=10**12, loss=1e9)])
    lines = lines_of(run, width)
    assert len(lines) == 3 + len(TASKS)
    assert max(map(len, lines)) <= width
    assert "…" in lines[3]


def test_many_tasks_take_half_of_the_terminal() -> None:
    lines = lines_of(told((), task_ids(LaunchOptions(script="train.py", ps=10, workers=90))))
    assert len(lines) == 24 // 2
    assert lines[-1] == "and 92 more"


def test_how_a_task_ended_stands_whatever_it_reported_last() -> None:
    run = told(MIDDLE)
    run.end(CHIEF, Ending(0))
    run.end(WORKER, Ending(137, 9))
    run.take(Report(task="worker:0", state="training"))
    assert [task.doing for task in run.tasks.values()][:2] == ["ended", "was killed by SIGKILL (code 137)"]


def test_what_a_stranger_reports_is_left_out() -> None:
    run = told([Report(task="worker:7", global_step=10**9, max_steps=10**9)])
    assert (run.global_step, run.max_steps, len(run.tasks)) == (0, None, len(TASKS))


class TestPace:
    """Global steps per second."""

    def test_it_is_that_of_the_last_seconds(self) -> None:
        clock = Clock()
        pace = Pace(clock)
        for step in (0, 5_000, 5_100):  # 5,000 is where the checkpoint ended that the run goes on from
            pace.take(step)
            clock.now += 1
        assert pace.recent == 50
        assert pace.overall == 100
        clock.now += 10 * WINDOW
        for step in (5_110, 5_120, 5_130):
            pace.take(step)
            clock.now += WINDOW
        assert pace.recent == 10 / (2 * WINDOW)

    def test_a_run_that_stands_still_gets_slower(self) -> None:
        clock = Clock()
        pace = Pace(clock)
        for step in (10, 20):
            pace.take(step)
            clock.now += 1
        clock.now += 3
        pace.take(20)
        assert (pace.recent, pace.overall) == (2, 10)

    def test_nothing_is_known_at_first(self) -> None:
        assert (Pace().recent, Pace().overall) == (0, 0)


class TestDisplay:
    """The thread that draws sleeps for as long as a test lasts."""

    @pytest.fixture(autouse=True)
    def slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(display, "INTERVAL", 1000.0)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")

    def shown(self, *lines: OutputLine) -> str:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, color_system="standard", width=80, height=24)
        with Display(told(()), console, TASKS) as shown:
            for line in lines:
                shown.show(line)
        return stream.getvalue()

    def test_lines_scroll_above_and_the_display_is_gone_at_the_end(self) -> None:
        seen = self.shown(OutputLine(CHIEF, "first", False), OutputLine(None, "last", True))
        before, _, after = seen.partition("first")
        assert "chief:0" in before
        assert before.endswith("chief:0 | \x1b[0m")
        assert after.index("\nlast\n") < after.index("global step")
        assert after.endswith(f"{SHOW_CURSOR}\r" + f"\x1b[1A{CLEAR_LINE}" * (3 + len(TASKS)))

    def test_a_long_line_is_the_terminals_to_wrap(self) -> None:
        assert "x" * 500 in self.shown(OutputLine(CHIEF, "x" * 500, False))

    def test_what_would_move_the_cursor_is_left_out_and_colours_stay(self) -> None:
        seen = self.shown(OutputLine(CHIEF, "\x1b[A\x1b[5;5H\x1b[31mred\x1b[0m [bold]", False))
        assert "\x1b[31mred\x1b[0m [bold]" in seen
        assert "\x1b[5;5H" not in seen

    def test_a_task_that_prints_much_does_not_fill_the_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(display, "LINES_AT_ONCE", 2)
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, color_system=None, width=80)
        with Display(told(()), console, TASKS) as shown:
            shown.show(OutputLine(CHIEF, "one", False))
            assert "one" not in stream.getvalue()
            shown.show(OutputLine(CHIEF, "two", False))
            assert "chief:0 | one\nchief:0 | two\n" in stream.getvalue()

    def test_a_failure_gives_the_terminal_back(self) -> None:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, color_system=None, width=80)
        with pytest.raises(KeyboardInterrupt), Display(told(()), console, TASKS):
            raise KeyboardInterrupt
        assert SHOW_CURSOR in stream.getvalue()

    @pytest.mark.parametrize(
        ("stdout", "stderr", "term", "found"),
        [
            (stream(Terminal), stream(Terminal), "xterm", True),
            (stream(), stream(Terminal), "xterm", False),
            (stream(Terminal), stream(), "xterm", False),
            (stream(Terminal), stream(Terminal), "dumb", False),
            (stream(Terminal, "latin-1"), stream(Terminal, "latin-1"), "xterm", False),
        ],
    )
    def test_it_needs_a_terminal_that_can_be_drawn_on(
        self, stdout: TextIO, stderr: TextIO, term: str, found: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert (find_terminal() is not None) == found


def test_without_a_display_the_progress_is_a_line_now_and_then() -> None:
    clock, said = Clock(), list[str]()
    progress = RunProgress.of(TASKS)
    progress.pace = Pace(clock)
    lines = ProgressLines(progress, said.append, clock)
    for seconds, step in ((0.0, 1000), (LINE_INTERVAL - 1, 1500), (1.0, 2000), (1.0, 2100), (LINE_INTERVAL, 2100)):
        clock.now += seconds
        lines.take(Report(task="chief:0", global_step=step, loss=0.25, max_steps=10_000))
    assert said == [
        "global step 2,000 of 10,000, 500 steps/s, loss 0.2500",
        "global step 2,100 of 10,000, 19 steps/s, loss 0.2500",
    ]


@pytest.mark.parametrize(("updates", "has_updated"), [((), None), ((0, 0), False), ((0, 3), True)])
def test_a_run_without_an_update_is_known(updates: tuple[int, ...], has_updated: bool | None) -> None:
    reports = (Report(task=f"ps:{index}", updates=count) for index, count in enumerate(updates))
    assert told(reports).has_updated is has_updated
