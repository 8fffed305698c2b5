"""Cases are found by the file that they are in, and by nothing else."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import benchmarks.cases
import pytest
from benchmarks import ROOT
from benchmarks.cases.step import Result
from benchmarks.harness import report
from benchmarks.harness.case import find_cases, measure_suite
from benchmarks.harness.command import app
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, read
from benchmarks.harness.footprint import Holding
from benchmarks.harness.options import SMOKE, Effort
from typer.testing import CliRunner

TOY = """
from benchmarks.harness.case import Case
from benchmarks.harness.figure import Subject
from benchmarks.harness.options import Effort

def measure(options):
    for size in options.pick((1, 2, 3), (1, 3)):
        subject = Subject(case="counting", size=size, size_unit="toys", beside="nothing", target=0.5)
        yield subject.measure(lambda: options.seconds, lambda: 1.0, options.repeats)

CASE = Case(title="How toys count", options=Effort, measure=measure)
"""


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder whose files are cases as well."""
    monkeypatch.setattr(benchmarks.cases, "__path__", [*benchmarks.cases.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("benchmarks.cases.toy", None)
    vars(benchmarks.cases).pop("toy", None)


def test_a_case_is_one_file(plug: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(find_cases())
    plug.joinpath("toy.py").write_text(TOY)
    assert set(find_cases()) == before | {"toy"}

    for arguments, sizes in (((), [1, 2, 3]), (("--quick",), [1, 3]), (("--sizes", "least"), [1])):
        shown = CliRunner().invoke(app(), ["toy", *arguments, "--json"])
        assert shown.exit_code == 0, shown.output
        figures = list(read(shown.stdout.splitlines()))
        assert [figure.key for figure in figures] == [("toy", "counting", size) for size in sizes]
    assert "How toys count" in CliRunner().invoke(app(), ["toy", "--smoke"]).stdout
    assert "How toys count" in CliRunner().invoke(app(), ["--help"]).stdout
    assert "## How toys count" in report.results(figures, "pictures")

    toy = find_cases()["toy"]
    monkeypatch.setattr("benchmarks.harness.case.find_cases", lambda: {"toy": toy})
    assert [figure.benchmark for figure in measure_suite(Effort(**SMOKE))] == ["toy"]


def test_the_example_of_a_new_case_works(plug: Path) -> None:
    (example,) = re.findall(r"```python\n(\"\"\"Copies.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    plug.joinpath("toy.py").write_text(example)
    shown = CliRunner().invoke(app(), ["toy", "--smoke", "--json"])
    assert [figure.key for figure in read(shown.stdout.splitlines())] == [("toy", "copy", 4000)]


def test_options_of_a_case_are_those_of_its_command(plug: Path) -> None:
    plug.joinpath("toy.py").write_text(TOY)
    shown = CliRunner().invoke(app(), ["toy", "--seconds", "0.25", "--repeats", "2", "--sizes", "least", "--json"])
    [figure] = read(shown.stdout.splitlines())
    assert (figure.measured, figure.ratios) == (0.25, [0.25, 0.25])

    refused = CliRunner().invoke(app(), ["toy", "--repeats", "0"])
    assert refused.exit_code == 1
    assert "error: repeats: expected 1 or more, got 0" in refused.stderr


def test_a_file_without_a_case_is_refused(plug: Path) -> None:
    plug.joinpath("toy.py").write_text("CASE = None\n")
    with pytest.raises(BenchmarkError, match="toy.py: expected a Case named CASE, got None"):
        find_cases()


def test_only_cases_with_the_options_of_the_suite_are_part_of_it() -> None:
    assert all(case.options is Effort for case in find_cases().values() if case.is_in_suite)
    assert [name for name, case in find_cases().items() if case.is_in_suite] == [
        "null", "lanes", "training", "growth", "latency", "startup"
    ]  # fmt: skip


def of(model: str, **more: object) -> list[Figure]:
    holding = Holding(steady=2.0, peak=2.2, start_peak=3.0, copy_bytes=100, steady_bytes=200)
    result = {"lane": "auto", "steps_per_second": 24.0, "plain_steps_per_second": 20.0, "ratio": 1.2, "ratios": [1.2]}
    memory = {"staleness_mean": 0.5, "staleness_max": 2, "worker_memory": holding, "ps_memory": None}
    return list(Result(**{"model": model, **result, **memory, **more}).figures())


def test_what_was_promised_is_judged_for_two_workers_and_one_ps() -> None:
    promised = {figure.case: (figure.target, figure.is_reached) for figure in of("large")}
    assert promised == {
        "large, auto: times plain PyTorch": (0.95, True),
        "large, auto: copies of the model on a worker, between steps": (2.1, True),
        "large, auto: copies of the model on a worker, at the peak of training": (2.1, False),
        "large, auto: copies of the model on a worker, at the peak of the start": (None, None),
    }
    assert [figure.target for figure in of("small")] == [1.25, None, None, None]
    assert [figure.target for figure in of("large", threads=4)] == [None] * 4
