"""What the demo shows: while a run goes on, and of what came of it. 80 columns, and paths that can be copied."""

import pytest
from rich.console import Console

from paramserver.cluster.report import Report
from paramserver.demo.progress import RunProgress, TaskProgress
from paramserver.demo.run import TASKS, run_demo
from paramserver.errors import ConfigError

LONG = "/a/folder/of/a/name/that/is/so/long/that/no/terminal/of/eighty/columns/shows/it/in/one/line"


@pytest.fixture
def progress():
    """A run in its middle."""
    run = RunProgress({task: TaskProgress() for task in TASKS}, 10_000)
    for report in (
        Report(task="chief:0", state="training", global_step=100, steps_per_second=1234.5, loss=2.25),
        Report(task="chief:0", state="waiting for worker:0", global_step=9_999, paths={"summaries": LONG}),
        Report(task="worker:0", state="training", global_step=10_001, steps_per_second=1200.0, loss=0.012345),
        Report(task="ps:0", state="serving", updates=10_001, mean_staleness=1.04, largest_staleness=137),
        Report(task="ps:1", state="serving", updates=10_001, mean_staleness=1.01, largest_staleness=99),
        Report(task="evaluator:0", state="evaluating ckpt-10000"),
        Report(task="evaluator:0", evaluation={"global_step": 10_000, "accuracy": 0.97625, "loss": 0.09211}),
        Report(task="evaluator:0", paths={"export": f"{LONG}/export/final/1700000000"}),
    ):
        run.take(report)
    return run


def shown(renderable):
    console = Console(width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def test_a_report_changes_what_it_names_and_nothing_else(progress):
    chief = progress.tasks["chief:0"]
    assert (chief.state, chief.global_step, chief.loss) == ("waiting for worker:0", 9_999, 2.25)


def test_the_global_step_is_the_highest_that_was_heard_of(progress):
    assert progress.global_step == 10_001


def test_the_display_has_a_line_for_each_task_and_fits(progress):
    lines = shown(progress.live())
    assert len(lines) == 2 + len(TASKS)
    assert max(map(len, lines)) <= 80
    assert "10001 of 10000" in lines[0]
    assert "1,234 steps/s" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == list(TASKS)
    assert "1.04 (max 137)" in lines[4]


def test_a_run_that_has_not_begun_can_be_shown():
    empty = RunProgress({task: TaskProgress() for task in TASKS}, 10)
    assert "0 of 10" in shown(empty.live())[0]
    assert empty.steps_per_second == 0
    assert empty.results()


def test_the_title_of_the_evaluations_is_one_line(progress):
    lines = shown(progress.summary())
    assert lines[0].strip() == "Evaluations on the test images"
    assert any(row.replace("│", " ").split() == ["10000", "0.976", "0.0921"] for row in lines)


def test_the_results_name_everything_and_keep_paths_whole(progress):
    progress.take(Report(task="chief:0", paths={"checkpoint": f"{LONG}/ckpt-10001"}))
    results = dict(progress.results())
    assert results.pop("global steps/s")
    assert results == {
        "test accuracy": "0.976",
        "updates applied": "ps:0 10001, ps:1 10001",
        "staleness": "mean 1.04, largest 137",
        "last checkpoint": f"{LONG}/ckpt-10001",
        "TensorBoard files": LONG,
        "exported model": f"{LONG}/export/final/1700000000",
    }


def test_steps_must_be_positive():
    with pytest.raises(ConfigError, match="demo: --steps: expected a positive number, got 0"):
        run_demo(steps=0)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="demo: --model-dir: .*file/run cannot be made"):
        run_demo(steps=1, model_dir=str(tmp_path / "file" / "run"))
