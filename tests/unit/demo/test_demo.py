"""What the demo says of a run that is over, and what it refuses. Paths can be copied whole."""

import pytest
from rich.console import Console

from paramserver.cluster.report import Report
from paramserver.cluster.task import TaskId
from paramserver.demo.results import evaluations, results, times
from paramserver.demo.run import run_demo
from paramserver.errors import ConfigError
from paramserver.launch.progress import RunProgress

TASKS = ("chief:0", "worker:0", "ps:0", "ps:1", "evaluator:0")
LONG = "/a/folder/of/a/name/that/is/so/long/that/no/terminal/of/eighty/columns/shows/it/in/one/line"


@pytest.fixture
def progress():
    """A run at its end."""
    run = RunProgress.of(map(TaskId.parse, TASKS))
    for report in (
        Report(task="chief:0", state="training", global_step=10_001, paths={"summaries": LONG}),
        Report(task="ps:0", updates=10_001, mean_staleness=1.04, largest_staleness=137),
        Report(task="ps:1", updates=10_001, mean_staleness=1.01, largest_staleness=99),
        Report(task="evaluator:0", evaluation={"global_step": 10_000, "accuracy": 0.97625, "loss": 0.09211}),
        Report(task="evaluator:0", paths={"export": f"{LONG}/export/final/1700000000"}),
    ):
        run.take(report)
    return run


def test_a_run_that_has_not_begun_has_results():
    assert dict(results(RunProgress.of([])))["global steps/s"] == "0"


def test_each_evaluation_has_a_line(progress):
    console = Console(width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(evaluations(progress))
    rows = [row.replace("│", " ").split() for row in capture.get().splitlines()]
    assert ["10000", "0.976", "0.0921"] in rows


def test_the_results_name_everything_and_keep_paths_whole(progress):
    progress.take(Report(task="chief:0", paths={"checkpoint": f"{LONG}/ckpt-10001"}))
    found = dict(results(progress))
    assert found.pop("global steps/s")
    assert found == {
        "test accuracy": "0.976",
        "updates applied": "ps:0 10001, ps:1 10001",
        "staleness": "mean 1.04, largest 137",
        "last checkpoint": f"{LONG}/ckpt-10001",
        "TensorBoard files": LONG,
        "exported model": f"{LONG}/export/final/1700000000",
    }


def test_where_the_time_went_has_a_line_for_each_worker_and_ps_in_80_columns(progress):
    spent = {"computing": 0.0004321, "reducing": 0.0, "blocked": 0.0125}
    servers = {f"ps:{index}/{what}": 0.25 for index in range(2) for what in ("sending", "waiting", "applying")}
    progress.take(Report(task="worker:0", step_seconds=spent | servers))
    console = Console(width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(times(progress))
    head, *rows = (row.split() for row in capture.get().splitlines())
    assert head == ["task", "computing", "reducing", "blocked", "ps", "sending", "waiting", "applying"]
    assert rows == [
        ["worker:0", "0.432", "0.000", "12.500", "ps:0", "250.000", "250.000", "250.000"],
        ["ps:1", "250.000", "250.000", "250.000"],
    ]


def test_steps_must_be_positive():
    with pytest.raises(ConfigError, match="demo: --steps: expected a positive number, got 0"):
        run_demo(steps=0)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="demo: --model-dir: .*file/run cannot be made"):
        run_demo(steps=1, model_dir=str(tmp_path / "file" / "run"))


def test_a_url_is_refused():
    with pytest.raises(ConfigError, match="demo: --model-dir: expected a folder of this machine, got s3://bucket/run"):
        run_demo(steps=1, model_dir="s3://bucket/run")
