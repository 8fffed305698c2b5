"""How a step of Slurm ends: by failures, signals and Slurm itself; and what is refused."""

from __future__ import annotations

import re
import signal
import sys

import pytest
from tests.multihost.cluster import ESTIMATOR, OWN_LOOP
from tests.multihost.hosts import ROOT
from tests.slurm.daemons import Slurm
from tests.slurm.test_runs import LAUNCH, LOOP, MEET, PARAMSERVER

from paramserver.estimator.checkpoint import inspect_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]

FOREVER = f"{ESTIMATOR}\nmain(100_000_000, save_checkpoints_steps=100_000_000)"
RUN = ("--ps", "2", "--workers", "2")
BEGUN = "worker:0 | begins at"


def saved_step(slurm: Slurm) -> int:
    """The step of the last checkpoint on the chief's node."""
    return inspect_checkpoint(str(slurm.path("n3", "/tmp/model"))).step  # noqa: S108


@pytest.fixture(autouse=True)
def _no_model(slurm: Slurm) -> None:
    slurm.run("srun", "--nodes=3", "rm", "-rf", "/tmp/model")  # noqa: S108


@pytest.mark.parametrize("cancel", [("scancel",), ("scancel", "--signal=TERM")])
def test_the_chief_saves_when_the_job_is_cancelled(slurm: Slurm, cancel: tuple[str, ...]) -> None:
    launch = " ".join((*LAUNCH, *RUN, slurm.write("train.py", FOREVER)))
    job = slurm.submit("job", f"{launch}; echo ended with $?", "--nodes=3")
    slurm.await_output("job", BEGUN)
    slurm.run(*cancel, job)
    slurm.await_no_jobs()
    said = slurm.output("job")
    assert saved_step(slurm) > 0, said
    assert "chief:0 is asked to leave: saved a checkpoint" in said
    assert "ps:0 leaves at step" in said


def test_the_chief_saves_at_the_time_limit(slurm: Slurm) -> None:
    program = slurm.write("train.py", FOREVER)
    script = f"{' '.join(LAUNCH)} {' '.join(RUN)} {program}; echo ended with $?"
    # The signal comes up to a minute early: Slurm looks twice a minute or so.
    slurm.submit("job", script, "--nodes=3", "--time=1", "--signal=TERM@50")
    slurm.await_output("job", BEGUN)
    slurm.await_output("job", "ended with 143")
    assert saved_step(slurm) > 0


def test_the_example_goes_on_when_its_job_is_in_the_queue_again(slurm: Slurm) -> None:
    shared = FOREVER.replace("/tmp/model", str(slurm.folder / "model"))  # noqa: S108
    example = (ROOT / "examples" / "slurm" / "train.sbatch").read_text()
    example = example.replace("paramserver launch", " ".join((*PARAMSERVER, "launch")))
    options = ("--nodes=3", "--cpus-per-task=1", "--time=10")
    job = slurm.submit("job", example, *options, arguments=(slurm.write("train.py", shared),))
    slurm.await_output("job", "worker:2 | begins at")
    slurm.run("scancel", "--signal=TERM", job)
    slurm.await_output("job", "chief:0 is asked to leave: saved a checkpoint")
    begun = re.compile(r"^chief:0 \| begins at 0$.*^chief:0 \| begins at [1-9]", re.DOTALL | re.MULTILINE)
    slurm.await_true("it does not go on", lambda: begun.search(slurm.output("job")) is not None)


def test_ctrl_c_lets_the_chief_save(slurm: Slurm) -> None:
    program = slurm.write("train.py", FOREVER)
    script = f"trap : INT; echo launcher $$ >&2; exec {' '.join(LAUNCH)} {' '.join(RUN)} {program}"
    job = slurm.start("salloc", "--quiet", "--nodes=3", "sh", "-c", script)
    job.await_word(BEGUN)
    slurm.signal_process(b"--on", signal.SIGINT)
    assert job.ends() == 130, job.said
    assert "stopping the run (SIGINT)" in job.said
    assert saved_step(slurm) > 0


def test_a_second_ctrl_c_kills(slurm: Slurm) -> None:
    hung = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{OWN_LOOP}\nsay('hangs')\nsignal.pause()"
    program = slurm.write("train.py", f"{hung}\nwhile True: signal.pause()")
    job = slurm.start("salloc", "--quiet", "--nodes=3", *LAUNCH, *RUN, program)
    job.await_word("chief:0 | hangs")
    slurm.signal_process(b"--on", signal.SIGINT)
    job.await_word("stopping the run")
    slurm.signal_process(b"--on", signal.SIGINT)
    assert job.ends() == 130, job.said
    assert "killing the tasks that are left" in job.said


def test_a_worker_that_fails(slurm: Slurm) -> None:
    fails = "if not strategy.is_chief: sys.exit(3)\n"
    program = slurm.write("train.py", f"{OWN_LOOP}\n{MEET}\n{fails}train(20)\nsay('is done')")
    job = slurm.start("salloc", "--quiet", "--nodes=3", *LAUNCH, *RUN, program)
    assert job.ends() == 3, job.said
    assert "worker:0 exited with code 3; the others go on" in job.said
    assert "chief:0 | is done" in job.said
    assert job.said.endswith("error: worker:0 exited with code 3\n")


def test_a_chief_that_fails(slurm: Slurm) -> None:
    fails = "if strategy.is_chief: raise ValueError('wrong data')\n"
    program = slurm.write("train.py", f"{OWN_LOOP}\n{fails}train(100_000_000)")
    job = slurm.start("salloc", "--quiet", "--nodes=3", *LAUNCH, *RUN, program)
    assert job.ends() == 1, job.said
    assert "chief:0 | ValueError: wrong data" in job.said
    assert "chief:0 exited with code 1; stopping the run" in job.said


def test_a_ps_that_dies(slurm: Slurm) -> None:
    program = slurm.write("train.py", FOREVER)
    job = slurm.start("salloc", "--quiet", "--nodes=3", *LAUNCH, *RUN, program)
    job.await_word(BEGUN)
    slurm.kill_task(1)
    assert job.ends() == 137, job.said
    assert "ps:1 was killed by SIGKILL (code 137); stopping the run" in job.said
    assert "error: ps:1 was killed by SIGKILL (code 137)" in job.said.splitlines()[-1]


def test_a_step_with_fewer_tasks_than_roles(slurm: Slurm) -> None:
    job = slurm.start(
        *("srun", "--ntasks=3", *PARAMSERVER, "task", slurm.write("train.py", LOOP)),
        env={"PARAMSERVER_TOKEN": "right", "PARAMSERVER_SLURM_JOBS": "ps=2,chief=1,worker=1"},
    )
    assert job.ends() == 1
    assert job.said.count("and 3 tasks in all") == 3
    assert "got ps=2,chief=1,worker=1; give the step as many tasks as the jobs have" in job.said


def test_a_distribution_that_tasks_cannot_tell(slurm: Slurm) -> None:
    command = ("srun", "--nodes=2", "--ntasks=4", "--distribution=plane=1", *PARAMSERVER, "task")
    job = slurm.start(*command, slurm.write("train.py", LOOP))
    assert job.ends() == 1
    assert "got SLURM_DISTRIBUTION=plane" in job.said


def test_outside_of_an_allocation(slurm: Slurm) -> None:
    job = slurm.start(*LAUNCH, slurm.write("train.py", LOOP))
    assert job.ends() == 1
    assert job.said.startswith("error: launch --on slurm: expected to be inside an allocation")


def test_without_srun(slurm: Slurm) -> None:
    program = slurm.write("train.py", LOOP)
    job = slurm.start("salloc", "--quiet", "/usr/bin/env", f"PATH={sys.prefix}/bin", *LAUNCH, program)
    assert job.ends() == 1
    assert "there is no srun in PATH" in job.said


def test_in_the_script_of_a_batch_job(slurm: Slurm) -> None:
    slurm.submit("job", f"{' '.join(PARAMSERVER)} task --cluster slurm {slurm.write('train.py', LOOP)}")
    slurm.await_no_jobs()
    assert "it is no task of a step" in slurm.output("job")
