"""Whole runs as actors of Ray, on a cluster of three nodes on this machine."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.multihost.cluster import ESTIMATOR, OWN_LOOP
from tests.ray.fleet import PARAMSERVER, Fleet, interrupt

from paramserver.estimator.checkpoint import inspect_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.multiprocess]

RUN = ("--ps", "2", "--workers", "2")
UNTIL_STOP = f"""
import pathlib
{ESTIMATOR}
endless = train_input
def train_input():
    for batch in endless():
        if pathlib.Path("stop").exists():
            return
        yield batch
""".replace("/tmp/model", "model")  # noqa: S108

MEET = """
import os, pathlib, time

# Without it, a chief of so few steps could end before a worker has begun.
run = os.environ["PARAMSERVER_RUN_ID"]
pathlib.Path(f"{run}-{strategy.is_chief}").touch()
while len(list(pathlib.Path().glob(f"{run}-*"))) < 2:
    time.sleep(0.02)
"""

REPORTED = """
import sys
from paramserver.launch.backends import load
from paramserver.launch.ray_options import RayOptions
from paramserver.launch.spec import LaunchOptions

reports = []
ray = RayOptions(address=sys.argv[1])
options = LaunchOptions(script=sys.argv[2], on="ray", ps=2, workers=2, evaluator=True, ray=ray)
code = load("ray").launch(options, reports.append)
steps = max(report.global_step or 0 for report in reports)
print("told", *sorted({report.task for report in reports}), steps >= 100)
sys.exit(code)
"""

LOOP = f"""
{OWN_LOOP}
{MEET}
train(20)
strategy.wait_for_workers()
if strategy.is_chief:
    say("at", strategy.global_step)
    say("resolver", type(ps.resolve()).__name__, ps.RayClusterResolver().task_type)
"""


def served(said: str) -> dict[str, str]:
    """The address of each ps, by its log; the last one if it was started again."""
    return dict(re.findall(r"(ps:\d) serves at (\S+)", said))


def test_a_loop_of_ones_own(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    run = fleet.launch(tmp_path, *RUN, write(LOOP))
    assert run.ends() == 0, run.said
    assert sorted(served(run.said)) == ["ps:0", "ps:1"]
    assert "chief:0 | at 40" in run.said
    assert "chief:0 | resolver RayClusterResolver chief" in run.said
    assert "worker:0 | lanes" in run.said
    fleet.await_idle()


def test_an_estimator_with_an_evaluator(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    program = write(f"{ESTIMATOR}\nmain(100)".replace("/tmp/model", "model"))  # noqa: S108
    run = fleet.start(tmp_path, sys.executable, write(REPORTED, name="launch.py"), fleet.address, program)
    assert run.ends() == 0, run.said
    assert "told chief:0 evaluator:0 ps:0 ps:1 worker:0 True" in run.said  # reports come through
    assert re.search(r"^chief:0 \| .*saved a checkpoint of step 1\d\d", run.said, re.MULTILINE)
    assert re.search(r"^evaluator:0 \| .*evaluated step 1\d\d", run.said, re.MULTILINE)
    assert inspect_checkpoint(str(tmp_path / "model")).step >= 100


def test_two_runs_at_a_time_do_not_meet(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    runs = [fleet.launch(tmp_path, *RUN, write(LOOP)) for _ in range(2)]
    codes = [run.ends() for run in runs]
    assert codes == [0, 0], runs[0].said + runs[1].said
    assert all("chief:0 | at 40" in run.said for run in runs)
    first, second = (set(served(run.said).values()) for run in runs)
    assert len(first) == len(second) == 2
    assert not first & second


def test_a_folder_is_copied_to_the_nodes(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    write("value = 4711", name="helper.py")
    write(OWN_LOOP, "import helper, os\nsay('helper', helper.value, os.getcwd())")
    run = fleet.launch(tmp_path, *RUN, "--working-dir", ".", "train.py")
    assert run.ends() == 0, run.said
    (found,) = set(re.findall(r"chief:0 \| helper 4711 (\S+)", run.said))
    assert found != str(tmp_path)


@pytest.mark.parametrize("task", ["ps:0", "chief:0", "worker:0"])
def test_a_node_is_lost(fleet: Fleet, write: Callable[..., str], tmp_path: Path, task: str) -> None:
    program = write(UNTIL_STOP, "main(100_000_000, save_checkpoints_steps=200)")
    run = fleet.launch(tmp_path, *RUN, "--restarts", "3", "--heartbeat-timeout", "5", program)
    run.await_word("worker:0 . begins at")
    run.await_word("saved a checkpoint of step [1-9]")
    before = served(run.said)
    fleet.remove_node_of(task)
    run.await_word(f"{task} was killed by SIGKILL .code 137.; it is started again")
    run.await_word("saved a checkpoint of step" if task == "ps:0" else f"{task} . begins at")
    if task == "ps:0":
        assert served(run.said)["ps:0"] != before["ps:0"]
        run.await_word("saved a checkpoint of step")  # it trains again
    (tmp_path / "stop").touch()
    assert run.ends() == 0, run.said
    fleet.await_idle()


def test_ctrl_c_lets_the_chief_save(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    program = write(UNTIL_STOP, "main(100_000_000, save_checkpoints_steps=200)")
    run = fleet.launch(tmp_path, *RUN, program)
    run.await_word("saved a checkpoint of step [1-9]")
    interrupt(run)
    assert run.ends() == 130, run.said
    assert "stopping the run (SIGINT)" in run.said
    assert "chief:0 is asked to leave: saved a checkpoint" in run.said
    assert inspect_checkpoint(str(tmp_path / "model")).step > 0
    fleet.await_idle()


def test_a_second_ctrl_c_kills(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('hangs', flush=True)"
    run = fleet.launch(tmp_path, *RUN, write(deaf, "while True: signal.pause()"))
    run.await_word("chief:0 . hangs")
    interrupt(run)
    run.await_word("stopping the run")
    interrupt(run)
    assert run.ends() == 130, run.said
    fleet.await_idle()


def test_a_driver_that_is_killed_leaves_nothing(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    run = fleet.launch(tmp_path, *RUN, write(UNTIL_STOP, "main(100_000_000)"))
    run.await_word("worker:0 . begins at")
    fleet.process_of("ps:1")
    run.close()
    fleet.await_idle()


def test_a_worker_that_fails(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    fails = "if not strategy.is_chief: sys.exit(3)\ntrain(200)\nsay('is done')"
    run = fleet.launch(tmp_path, *RUN, write(OWN_LOOP, MEET, fails))
    assert run.ends() == 3, run.said
    assert "chief:0 | is done" in run.said
    assert run.said.rstrip().endswith("error: worker:0 exited with code 3"), run.said


def test_a_chief_that_fails(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    program = write(OWN_LOOP, "if strategy.is_chief: raise ValueError('wrong data')", "train(100_000_000)")
    run = fleet.launch(tmp_path, *RUN, program)
    assert run.ends() == 1, run.said
    assert "chief:0 | ValueError: wrong data" in run.said
    assert "chief:0 exited with code 1; stopping the run" in run.said


def test_a_cluster_without_the_resources(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    asked = ("--start-timeout", "1", "--worker-resources", "CPU=99,GPU=1")
    run = fleet.launch(tmp_path, *RUN, *asked, write(LOOP))
    assert run.ends() == 1
    assert "waiting for resources, for 1 s at most: no node has CPU=99,GPU=1, which a task needs" in run.said
    assert "error: launch --on ray: no place for the tasks within 1 s: no node has CPU=99,GPU=1" in run.said
    assert "needed: 2 x ps CPU=1; 1 x chief CPU=99,GPU=1; 1 x worker CPU=99,GPU=1 (SPREAD)" in run.said


def test_more_tasks_than_nodes_with_strict_spread(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    run = fleet.launch(tmp_path, *RUN, "--start-timeout", "1", "--placement", "STRICT_SPREAD", write(LOOP))
    assert run.ends() == 1
    assert "4 tasks need 4 nodes with STRICT_SPREAD, and there are 3" in run.said


def test_another_run_has_the_resources(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    program = write("import signal", "print('is here', flush=True)", "signal.pause()")
    first = fleet.launch(tmp_path, *RUN, "--worker-resources", "CPU=7", program)
    first.await_word("worker:0 . is here")
    second = fleet.launch(tmp_path, "--start-timeout", "3", "--worker-resources", "CPU=7", program)
    assert second.ends() == 1
    assert "no place for the tasks within 3 s: other runs have the resources" in second.said


def test_a_cluster_that_is_not_there(fleet: Fleet, write: Callable[..., str], tmp_path: Path) -> None:
    command = ("launch", "--on", "ray", "--address", "127.0.0.1:1", write(LOOP))
    run = fleet.start(tmp_path, *PARAMSERVER, *command)
    assert run.ends() == 1
    assert "there is no cluster of Ray at '127.0.0.1:1' (Connection refused); start one" in run.said
