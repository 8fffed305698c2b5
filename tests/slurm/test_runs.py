"""Whole runs as steps of Slurm, on nodes that share one folder and nothing else: not /tmp, not /dev/shm."""

from __future__ import annotations

import re
import sys

import pytest
from tests.multihost.cluster import ESTIMATOR, OWN_LOOP
from tests.slurm.daemons import Slurm

from paramserver.estimator.checkpoint import inspect_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]

PARAMSERVER = (sys.executable, "-m", "paramserver")
LAUNCH = (*PARAMSERVER, "launch", "--on", "slurm")

MEET = """
import json, os, pathlib, time

# Without it, a chief of so few steps could end before a worker has begun.
here = f"here-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
pathlib.Path(f"{here}-{os.environ['SLURM_PROCID']}").touch()
jobs = json.loads(os.environ["TF_CONFIG"])["cluster"]
while len(list(pathlib.Path().glob(f"{here}-*"))) < len(jobs["chief"] + jobs["worker"]):
    time.sleep(0.02)
"""

LOOP = f"""
{OWN_LOOP}
{MEET}
train(20)
strategy.wait_for_workers()
if strategy.is_chief:
    say("at", strategy.global_step)
"""


def served(said: str) -> dict[str, str]:
    """The address of each ps, by its log."""
    return dict(re.findall(r"(ps:\d) serves at (\S+)", said))


def test_a_launched_run(slurm: Slurm) -> None:
    shared = str(slurm.folder / "model")  # an evaluator reads what the chief has saved
    program = slurm.write("train.py", f"{ESTIMATOR}\nmain(100)".replace("/tmp/model", shared))  # noqa: S108
    run = ("--ps", "2", "--workers", "2", "--evaluator", program)
    said = slurm.run("salloc", "--quiet", "--nodes=3", "--ntasks=5", *LAUNCH, *run)
    assert [address.partition(":")[0] for _, address in sorted(served(said).items())] == ["n1", "n2"]
    assert re.search(r"^chief:0 \| .*saved a checkpoint of step \d{3,}", said, re.MULTILINE)
    assert re.search(r"^evaluator:0 \| .*evaluated step \d{3,}", said, re.MULTILINE)
    assert inspect_checkpoint(shared).step >= 100


def test_only_the_chief_sees_the_folder_of_the_model(slurm: Slurm) -> None:
    program = slurm.write("train.py", f"{ESTIMATOR}\nmain(100)")
    slurm.run("salloc", "--quiet", "--nodes=3", *LAUNCH, "--ps", "2", "--workers", "2", program)
    folder = "/tmp/model"  # noqa: S108  # of each node
    assert inspect_checkpoint(str(slurm.path("n3", folder))).step >= 100
    assert not slurm.path("n1", folder).exists()


def test_lanes_are_those_of_several_hosts(slurm: Slurm) -> None:
    program = slurm.write("train.py", LOOP)
    said = slurm.run("salloc", "--quiet", "--nodes=3", *LAUNCH, "--ps", "2", "--workers", "2", program)
    assert "chief:0 | lanes [<TcpLane to ps:0 by tcp>, <TcpLane to ps:1 by tcp>]" in said
    assert "worker:0 | lanes [<SharedMemoryLane to ps:0 by shared memory>, <TcpLane to ps:1 by tcp>]" in said
    assert "chief:0 | at 40" in said


@pytest.mark.parametrize("size", [("--ntasks=1",), ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2")])
def test_more_tasks_than_the_job_asked_for(slurm: Slurm, size: tuple[str, ...]) -> None:
    program = slurm.write("train.py", LOOP)
    said = slurm.run("salloc", "--quiet", *size, *LAUNCH, "--ps", "2", "--workers", "2", program)
    assert "2 ps tasks share 1 node" in said
    assert "chief:0 | at 40" in said


def test_by_hand(slurm: Slurm) -> None:
    program = slurm.write("train.py", LOOP)
    command = ("srun", "--label", "--nodes=2", "--ntasks=4", *PARAMSERVER, "task", program)
    said = slurm.run(*command, env={"PARAMSERVER_TOKEN": "right", "PARAMSERVER_SLURM_JOBS": "ps=2"})
    assert sorted(served(said)) == ["ps:0", "ps:1"]
    assert "2: at 40" in said


@pytest.mark.parametrize("components", [("--nodelist=n3", "--nodelist=n1,n2"), ("--nodelist=n1", "--nodelist=n2")])
def test_a_launched_run_in_a_heterogeneous_job(slurm: Slurm, components: tuple[str, str]) -> None:
    program = slurm.write("train.py", LOOP)
    first, second = components
    allocation = ("salloc", "--quiet", first, "--ntasks=1", ":", second, "--ntasks=2")
    said = slurm.run(*allocation, *LAUNCH, "--ps", "2", "--workers", "3", program)
    assert {address.partition(":")[0] for address in served(said).values()} == {first.partition("=")[2]}
    assert "chief:0 | at 60" in said


def test_a_heterogeneous_job_by_hand(slurm: Slurm) -> None:
    program = slurm.write("train.py", LOOP)
    task = (*PARAMSERVER, "task", program)
    script = f"srun --label --het-group=0 {' '.join(task)} : --het-group=1 {' '.join(task)}"
    allocation = ("salloc", "--quiet", "--nodelist=n3", "--ntasks=1", ":", "--nodelist=n1,n2", "--ntasks=3")
    said = slurm.run(*allocation, "sh", "-c", script, env={"PARAMSERVER_TOKEN": "right"})
    assert served(said)["ps:0"].startswith("n3:")
    assert "1: at 60" in said


def test_two_runs_in_one_allocation_do_not_meet(slurm: Slurm) -> None:
    programs = [slurm.write(f"train{number}.py", LOOP) for number in range(2)]
    launches = [" ".join((*LAUNCH, "--ps", "2", "--workers", "2", program)) for program in programs]
    script = f"{launches[0]} > first.out 2>&1 & {launches[1]} > second.out 2>&1 & wait"
    slurm.run("salloc", "--quiet", "--nodes=2", "--ntasks=4", "sh", "-c", script)
    said = [slurm.output(name) for name in ("first", "second")]
    assert all("chief:0 | at 40" in each for each in said)
    used = [set(served(each).values()) for each in said]
    assert len(used[0]) == len(used[1]) == 2
    assert not used[0] & used[1]


def test_an_element_of_an_array(slurm: Slurm) -> None:
    program = slurm.write("train.py", LOOP)
    script = f"{' '.join(LAUNCH)} --ps 1 --workers 2 {program}; echo ended with $?"
    slurm.submit("array", script, "--array=4,7", "--ntasks=3")
    slurm.await_no_jobs()
    said = [slurm.output(f"array-{element}") for element in (4, 7)]
    assert all("chief:0 | at 40" in each and "ended with 0" in each for each in said)
    assert served(said[0]) != served(said[1])
