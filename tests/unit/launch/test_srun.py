"""The step that a launch on Slurm starts, and what srun says of it."""

from __future__ import annotations

import pytest

from paramserver.cluster.task import TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Ending, Limits
from paramserver.launch.output import OutputLine
from paramserver.launch.spec import LaunchOptions
from paramserver.launch.srun import CANCELLED, StepSpec, advice, describe_step, plan_step, read_endings, read_line

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
HET = {
    "SLURM_JOB_ID": "7",
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_ID_HET_GROUP_0": "7",
    "SLURM_JOB_ID_HET_GROUP_1": "8",
    "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
    "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2",
}
OPTIONS = LaunchOptions(script="train.py", args=("--name", "two words"), ps=2, workers=2, evaluator=True, on="slurm")

DRY_RUN = """\
run 1f0c: 5 tasks, one step of job 7

# by SLURM_PROCID: 0=ps:0 1=ps:1 2=chief:0 3=worker:0 4=evaluator:0
PARAMSERVER_TOKEN='***' \\
PARAMSERVER_RUN_ID=1f0c \\
PARAMSERVER_LANE=auto \\
PARAMSERVER_SLURM_JOBS=ps=2,chief=1,worker=1,evaluator=1 \\
PYTHONUNBUFFERED=1 \\
srun --ntasks=5 --nodes=3 --distribution=cyclic --overcommit --overlap --kill-on-bad-exit=0 --wait=0 --label \
--input=none --mpi=none --export=ALL --job-name=paramserver-1f0c python -m paramserver task --cluster slurm train.py \
--name 'two words'
"""

DRY_RUN_HET = """\
run 1f0c: 5 tasks, one step of job 7

# by SLURM_PROCID: 0=ps:0 1=ps:1 2=chief:0 3=worker:0 4=evaluator:0
PARAMSERVER_TOKEN='***' \\
PARAMSERVER_RUN_ID=1f0c \\
PARAMSERVER_LANE=auto \\
PARAMSERVER_SLURM_JOBS=ps=2,chief=1,worker=1,evaluator=1 \\
PYTHONUNBUFFERED=1 \\
srun --het-group=0 --ntasks=2 --nodes=1 --distribution=cyclic --overcommit --overlap --kill-on-bad-exit=0 --wait=0 \
--label --input=none --mpi=none --export=ALL --job-name=paramserver-1f0c python -m paramserver task --cluster slurm \
train.py --name 'two words' : --het-group=1 --ntasks=3 --nodes=2 --distribution=cyclic --overcommit --overlap \
--kill-on-bad-exit=0 --wait=0 --label --input=none --mpi=none --export=ALL --job-name=paramserver-1f0c python -m \
paramserver task --cluster slurm train.py --name 'two words'
"""


def planned(options: LaunchOptions = OPTIONS, variables: dict[str, str] = ALLOCATION) -> StepSpec:
    return plan_step(options, variables, "secret", "1f0c", "python")


@pytest.mark.parametrize(("variables", "text"), [(ALLOCATION, DRY_RUN), (HET, DRY_RUN_HET)])
def test_a_dry_run_shows_the_step_as_a_shell_would_start_it_but_not_the_token(
    variables: dict[str, str], text: str
) -> None:
    assert describe_step(planned(variables=variables)) == text


def test_the_token_is_in_the_environment_only() -> None:
    spec = planned()
    assert spec.env["PARAMSERVER_TOKEN"] == "secret"
    assert not [word for word in spec.command if "secret" in word]


def test_options_go_to_the_tasks_by_the_environment() -> None:
    options = LaunchOptions(
        script="package.train", is_module=True, threads=3, lane="tcp", heartbeat_timeout=5.0, log_level="debug"
    )
    spec = planned(options, {**ALLOCATION, "SLURM_CPUS_PER_TASK": "4"})
    assert spec.env.items() >= {
        ("OMP_NUM_THREADS", "3"),
        ("PARAMSERVER_LANE", "tcp"),
        ("PARAMSERVER_HEARTBEAT_TIMEOUT", "5.0"),
        ("PARAMSERVER_LOG_LEVEL", "debug"),
        ("PARAMSERVER_SLURM_JOBS", "ps=1,chief=1"),
    }
    assert "--cpus-per-task=4" in spec.command
    assert "--nodes=2" in spec.command  # no more than there are tasks
    assert spec.command[-2:] == ("-m", "package.train")


def test_without_threads_each_task_finds_them_itself() -> None:
    assert "OMP_NUM_THREADS" not in planned().env


def test_outside_of_an_allocation() -> None:
    with pytest.raises(
        ConfigError, match="expected to be inside an allocation, but SLURM_JOB_ID is not set; run it in"
    ):
        planned(variables={})


def test_restarts_are_refused() -> None:
    options = LaunchOptions(script="train.py", limits=Limits(restarts=1))
    with pytest.raises(
        ConfigError, match="--restarts: expected 0, got 1: Slurm starts no task of a step again; submit"
    ):
        planned(options)


def test_other_numbers_of_components_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one component, or of two .* got 3; start the tasks by hand"):
        planned(variables={**HET, "SLURM_HET_SIZE": "3"})


def test_more_ps_tasks_than_nodes_are_told() -> None:
    assert advice(OPTIONS, ALLOCATION) == ""
    assert advice(OPTIONS, HET).startswith("2 ps tasks share 1 node;")


def test_lines_are_those_of_the_tasks_with_their_numbers() -> None:
    spec = planned()
    assert read_line(spec, "3: a: b", is_error=False) == OutputLine(TaskId.parse("worker:0"), "a: b", False)
    assert read_line(spec, " 0: ", is_error=True) == OutputLine(TaskId.parse("ps:0"), "", True)
    for line in ("srun: error: x", "9: no task", "12 tasks: x"):
        assert read_line(spec, line, is_error=True) == OutputLine(None, line, True)


@pytest.mark.parametrize(
    ("line", "endings"),
    [
        ("srun: error: n3: task 2: Exited with exit code 3", {"chief:0": Ending(3)}),
        ("srun: error: n2: tasks 0,3-4: Killed", dict.fromkeys(("ps:0", "worker:0", "evaluator:0"), Ending(137, 9))),
        ("srun: error: n2: task 1: Segmentation fault (core dumped)", {"ps:1": Ending(139, 11)}),
        ("srun: error: n2: task 1: Out Of Memory", {"ps:1": Ending(1)}),
        ("srun: error: n2: task 7: Killed", {}),
        ("srun: error: Unable to create step for job 7: Invalid job id specified", {}),
        ("task 2: Exited with exit code 3", {}),
    ],
)
def test_srun_names_the_tasks_that_fail(line: str, endings: dict[str, Ending]) -> None:
    assert {str(task): ending for task, ending in read_endings(planned(), line)} == endings


@pytest.mark.parametrize(
    "line",
    [
        "srun: Job step aborted: Waiting up to 22 seconds for job step to finish.",
        "slurmstepd-n1: error: *** STEP 20.0 ON n1 CANCELLED AT 2026-12-01T04:06:38 ***",
        "slurmstepd: error: *** JOB 20 ON n1 CANCELLED AT 2026-12-01T04:06:38 DUE TO TIME LIMIT ***",
    ],
)
def test_slurm_says_when_it_has_told_the_tasks_to_end(line: str) -> None:
    assert CANCELLED.match(line)
