"""The benchmark of checkpoints runs, with few values; what it measures then means nothing."""

import json
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("more", [[], ["--partitioned"]], ids=["whole", "partitioned"])
def test_the_benchmark_of_checkpoints_measures_both_sides_and_leaves_nothing(
    tmp_path: Path, warm: Warm, more: list[str]
) -> None:
    options = ["--megabytes", "8", "--repeats", "1", "--folder", tmp_path, "--json"]
    done = warm.run("benchmarks.checkpoint", *options, *more)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["values_bytes"] == pytest.approx(8e6, rel=0.01)
    assert result["is_partitioned"] == bool(more)
    for ratio in ("save_ratio", "restore_ratio"):
        assert [result[ratio]] * 2 == result[f"{ratio}s"]  # of the one turn
        assert result[ratio] > 0
    assert result["pause_seconds"] >= result["longest_pause_seconds"] > 0
    assert not list(tmp_path.iterdir())
