"""What figures come to, how they are shown, and when one counts as worse: the numbers of a report rest on it."""

from __future__ import annotations

import doctest
from pathlib import Path

import msgspec
import pytest
import typer
from benchmarks.harness import check, figure, report
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Subject, take_turns
from benchmarks.harness.participant import Measured
from benchmarks.harness.programs import herd

ROOT = Path(__file__).resolve().parents[3]


def of(ratio: float, *, better: str = "more", target: float | None = None, case: str = "pull", size: int = 4) -> Figure:
    return Subject(
        benchmark="lanes",
        case=case,
        size=size,
        size_unit="B",
        beside="memcpy",
        unit="s",
        better=better,
        target=target,
    ).figure([(ratio, 1.0)])


def write(file: Path, *figures: Figure) -> Path:
    file.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in figures))
    return file


def test_the_ratio_is_the_median_of_the_turns_and_not_that_of_the_medians() -> None:
    pairs = [(1.0, 2.0), (10.0, 10.0), (4.0, 1.0)]
    found = Subject(case="step", size_unit="B", beside="plain", unit="s", better="less").figure(pairs)
    assert found.ratios == [0.5, 1.0, 4.0]
    assert found.ratio == 1.0
    assert (found.measured, found.baseline) == (4.0, 2.0)


def test_every_other_turn_begins_with_the_other_side() -> None:
    order: list[str] = []

    def side(name: str, value: float) -> float:
        order.append(name)
        return value

    pairs = take_turns(lambda: side("ours", 1.0), lambda: side("other", 2.0), repeats=3)
    assert pairs == [(1.0, 2.0)] * 3
    assert order == ["ours", "other", "other", "ours", "ours", "other"]


@pytest.mark.parametrize(
    ("better", "ratio", "is_reached"),
    [("more", 0.85, True), ("more", 0.84, False), ("less", 0.85, True), ("less", 0.86, False)],
)
def test_a_target_is_a_least_or_a_most(better: str, ratio: float, is_reached: bool) -> None:
    assert of(ratio, better=better, target=0.85).is_reached is is_reached


def test_without_a_target_nothing_is_reached_or_missed() -> None:
    assert of(0.1).is_reached is None
    assert of(0.1).cells()[-2:] == ("", "")


def test_a_figure_is_the_same_after_a_line_of_json() -> None:
    one, other = of(0.5, target=0.4), of(2.0, better="less")
    lines = [msgspec.json.encode(one), b"", msgspec.json.encode(other)]
    assert list(figure.read(lines)) == [one, other]


def test_amounts_are_shown_as_documented() -> None:
    failed, attempted = doctest.testmod(figure)
    assert attempted
    assert not failed


def test_a_herd_is_as_fast_as_its_workers_together() -> None:
    parts = [
        Measured(steps=steps, seconds=seconds, staleness=steps, largest_staleness=steps, loss=0.0)
        for steps, seconds in ((100, 1.0), (30, 0.5))
    ]
    together = herd.together(parts)
    assert together.steps == 130
    assert together.steps / together.seconds == pytest.approx(100 + 60)
    assert (together.staleness, together.largest_staleness) == (130, 100)


def test_results_show_what_was_promised_first_and_then_everything() -> None:
    kept, missed, other = of(0.9, target=0.85, size=8), of(0.8, target=0.85), of(0.1, case="push")
    promised, lanes = report.results([kept, missed, other], "performance").split("## What goes through a lane")
    assert "| pull | 8 B |" in promised
    assert "| >= 0.85 | yes |" in promised
    assert "| >= 0.85 | NO |" in promised
    assert "push" not in promised
    assert "![What goes through a lane](performance/lanes.svg)" in lanes
    assert lanes.count("| pull |") == 2
    assert lanes.count("| push |") == 1


def test_a_page_keeps_its_own_text() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.replaced(page, "new")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.replaced(once, "new") == once


@pytest.mark.parametrize("page", ["no markers", report.BEGIN, f"{report.END}{report.BEGIN}"])
def test_a_page_without_a_place_for_results_is_refused(page: str) -> None:
    with pytest.raises(BenchmarkError, match="must hold"):
        report.replaced(page, "new")


def test_the_page_shows_the_committed_results() -> None:
    committed = list(figure.read(check.COMMITTED.read_bytes().splitlines()))
    assert report.results(committed, "performance") in report.PAGE.read_text()


def test_a_report_has_a_picture_of_each_benchmark_and_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    startup = Subject(benchmark="startup", case="launch", size_unit="run", beside="x").figure([(1, 1)])
    file = write(tmp_path / "results.jsonl", of(0.9, target=0.85), of(0.8, size=8), startup)
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}{report.END}")
    seen = []
    for _ in range(2):
        report.main(file, page)
        seen.append({path.name: path.read_bytes() for path in (tmp_path / "page").iterdir()} | {"": page.read_bytes()})
    assert seen[0].keys() == {"lanes.svg", "startup.svg", ""}
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("better", "now", "is_tolerated"),
    [("more", 0.5, True), ("more", 0.49, False), ("more", 2.0, True),
     ("less", 2.0, True), ("less", 2.01, False), ("less", 0.5, True)],
)  # fmt: skip
def test_worse_is_the_side_that_is_not_better(better: str, now: float, is_tolerated: bool) -> None:
    [change] = check.changes([of(now, better=better)], [of(1.0, better=better)], tolerance=1.0)
    assert change.is_reached is is_tolerated
    assert change.ratio == now


def test_only_what_both_sessions_measured_is_compared() -> None:
    [change] = check.changes([of(1.0), of(1.0, size=8)], [of(2.0), of(2.0, case="push")])
    assert (change.case, change.measured, change.baseline) == ("lanes: pull", 1.0, 2.0)
    with pytest.raises(BenchmarkError, match="nothing was measured that the committed results have"):
        check.changes([of(1.0, size=8)], [of(2.0)])


def test_the_check_fails_outside_its_tolerance_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = write(tmp_path / "committed.jsonl", of(1.0), of(1.0, case="push"))
    now = write(tmp_path / "now.jsonl", of(0.8), of(3.0, case="push"))
    check.main(now, committed, tolerance=0.3, quick=False)
    assert " NO " not in capsys.readouterr().out
    with pytest.raises(typer.Exit) as exit_:
        check.main(now, committed, tolerance=0.2, quick=False)
    assert exit_.value.exit_code == 1
    assert capsys.readouterr().out.count(" NO ") == 1


def test_what_is_no_result_is_an_error_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = write(tmp_path / "committed.jsonl", of(1.0))
    (tmp_path / "now.jsonl").write_text('{"steps": 3}\n')
    with pytest.raises(typer.Exit):
        check.main(tmp_path / "now.jsonl", committed, tolerance=0.3, quick=False)
    assert "error: Object missing required field" in capsys.readouterr().err
