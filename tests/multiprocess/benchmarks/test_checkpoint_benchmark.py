"""The benchmark of checkpoints runs, with few values; what it measures then means nothing."""

import re
from pathlib import Path

import pytest
from benchmarks.harness.figure import read
from tests.multiprocess.warm import Warm

pytestmark = [pytest.mark.multiprocess, pytest.mark.whole_program]


@pytest.mark.parametrize("more", [[], ["--partitioned"]], ids=["whole", "partitioned"])
def test_the_benchmark_of_checkpoints_measures_both_sides_and_leaves_nothing(
    tmp_path: Path, warm: Warm, more: list[str]
) -> None:
    options = ["--megabytes", "8", "--repeats", "1", "--seconds", "0.1", "--folder", tmp_path, "--json"]
    done = warm.run("benchmarks", "checkpoint", *options, *more)
    assert done.returncode == 0, done.stderr
    figures = list(read(done.stdout.splitlines()))
    kind = "partitioned variables" if more else "values"
    assert [re.sub(" on [^,]*,", ",", figure.case) for figure in figures] == [
        f"save of {kind}, beside save_file and fsync",
        f"save of {kind}, beside save_file",
        f"restore of {kind}, beside load_file and a copy",
        f"restore of {kind}, beside load_file",
        "pause of the ps in a save",
        "longest pause for a block",
        "slowest push to a block in a save",
        "memory of the ps beyond its values",
    ]
    assert all(figure.size == pytest.approx(8e6, rel=0.01) for figure in figures)
    assert all(figure.measured > 0 and figure.baseline > 0 for figure in figures[:-1])
    pause, longest = figures[4:6]
    assert pause.measured >= longest.measured
    assert not list(tmp_path.iterdir())
