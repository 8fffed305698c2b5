"""ps.Variable over real processes: nothing that any worker or any of its replicas assigns is lost or counted twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import sys
import torch
import paramserver as ps

torch.set_num_threads(1)
replicas, workers, times = map(int, sys.argv[1:])
strategy = ps.ParameterServerStrategy(compute_devices=[f"cpu:{index}" for index in range(replicas)])
with strategy.scope():
    each = ps.Variable(0, name="each", aggregation=ps.VariableAggregation.SUM)
    once = ps.Variable(0, name="once", aggregation=ps.VariableAggregation.ONLY_FIRST_REPLICA)
    many = ps.Variable(torch.zeros(3), name="many", aggregation=ps.VariableAggregation.MEAN)
    finished, left = ps.Variable(0), ps.Variable(0)
strategy.run(lambda: (each.assign_add(1), once.assign_add(1)))
for _ in range(times):
    many.assign_add(1)
finished.assign_add(1)
while finished < workers:
    pass
print(int(each), int(once), many.tolist(), flush=True)
left.assign_add(1)
while strategy.is_chief and left < workers:
    pass
"""


@pytest.mark.parametrize(
    ("workers", "replicas", "lane"), [(1, 4, "auto"), (2, 2, "tcp"), (3, 1, "auto"), (4, 2, "auto")]
)
def test_w04_workers_and_replicas_are_counted(
    tmp_path: Path, warm: Warm, workers: int, replicas: int, lane: str
) -> None:
    """The chief is one of the workers; each also adds many times at once (W09), and everyone sees the same."""
    script = tmp_path / "count.py"
    script.write_text(SCRIPT)
    options = ("--ps", "2", "--workers", str(workers), "--lane", lane)
    done = warm.launch(*options, script, str(replicas), str(workers), "200")
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback|Warning|ERROR|Exception", done.stderr), done.stderr
    said = re.findall(r"\S+:\d+ \| (.*)", done.stdout)
    assert said == [f"{workers * replicas} {workers} {[200.0 * workers] * 3}"] * workers
