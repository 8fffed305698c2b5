"""The plan of a local run: pure data, and the text that a dry run prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Limits
from paramserver.launch.spec import LaunchOptions, LaunchSpec, TaskSpec, describe, plan, shared_environment

DRY_RUN = """\
run <run id>: 3 tasks

# ps:0, listening on 127.0.0.1:<free port>
TF_CONFIG='{"cluster": {"chief": ["127.0.0.1:0"], "ps": ["127.0.0.1:<free port>"]}, \
"task": {"type": "ps", "index": 0}}' \\
PARAMSERVER_TOKEN='***' \\
PARAMSERVER_RUN_ID='<run id>' \\
PARAMSERVER_LANE=tcp \\
PYTHONUNBUFFERED=1 \\
OMP_NUM_THREADS=8 \\
MKL_NUM_THREADS=8 \\
GOMP_SPINCOUNT=10000 \\
GLIBC_TUNABLES=glibc.malloc.tcache_count=0 \\
python -m paramserver server

# chief:0
TF_CONFIG='{"cluster": {"chief": ["127.0.0.1:0"], "ps": ["127.0.0.1:<free port>"]}, \
"task": {"type": "chief", "index": 0}}' \\
PARAMSERVER_TOKEN='***' \\
PARAMSERVER_RUN_ID='<run id>' \\
PARAMSERVER_LANE=tcp \\
PYTHONUNBUFFERED=1 \\
OMP_NUM_THREADS=8 \\
MKL_NUM_THREADS=8 \\
GOMP_SPINCOUNT=10000 \\
GLIBC_TUNABLES=glibc.malloc.tcache_count=0 \\
python -m paramserver.launch.task train.py --name 'two words'

# evaluator:0
TF_CONFIG='{"cluster": {"chief": ["127.0.0.1:0"], "ps": ["127.0.0.1:<free port>"]}, \
"task": {"type": "evaluator", "index": 0}}' \\
PARAMSERVER_TOKEN='***' \\
PARAMSERVER_RUN_ID='<run id>' \\
PARAMSERVER_LANE=tcp \\
PYTHONUNBUFFERED=1 \\
OMP_NUM_THREADS=8 \\
MKL_NUM_THREADS=8 \\
GOMP_SPINCOUNT=10000 \\
GLIBC_TUNABLES=glibc.malloc.tcache_count=0 \\
python -m paramserver.launch.task train.py --name 'two words'
"""


def plan_of(options: LaunchOptions, cores: int = 8, already_set: tuple[str, ...] = ()) -> LaunchSpec:
    ports = [5000 + index for index in range(options.ps)]
    return plan(options, ports, "secret", "run", cores, already_set, "python")


def threads_of(options: LaunchOptions, cores: int, already_set: tuple[str, ...] = ()) -> list[str | None]:
    env = plan_of(options, cores, already_set).tasks[0].env
    return [env.get("OMP_NUM_THREADS"), env.get("MKL_NUM_THREADS")]


def test_a_dry_run_shows_each_task_as_a_shell_would_start_it_but_not_the_token() -> None:
    options = LaunchOptions(script="train.py", args=("--name", "two words"), evaluator=True, lane="tcp")
    spec = plan(options, [None], "secret", "<run id>", cores=8, python="python")
    assert describe(spec) == DRY_RUN


def test_ps_tasks_come_first_and_the_chief_counts_as_a_worker() -> None:
    spec = plan_of(LaunchOptions(script="train.py", ps=2, workers=3, evaluator=True))
    assert [str(task.task) for task in spec.tasks] == [
        "ps:0",
        "ps:1",
        "chief:0",
        "worker:0",
        "worker:1",
        "evaluator:0",
    ]


def test_a_ps_never_runs_the_users_script() -> None:
    spec = plan_of(LaunchOptions(script="train.py", ps=2, workers=2, evaluator=True))
    for task in spec.tasks:
        assert ("train.py" in task.command) == (task.task.role is not Role.PS)


def test_every_task_gets_the_same_cluster_and_its_own_place_in_it() -> None:
    spec = plan_of(LaunchOptions(script="train.py", ps=2, workers=3, evaluator=True))
    configs = [json.loads(task.env["TF_CONFIG"]) for task in spec.tasks]
    for task, config in zip(spec.tasks, configs, strict=True):
        assert config["task"] == {"type": task.task.role.value, "index": task.task.index}
        assert config["cluster"] == {
            "chief": ["127.0.0.1:0"],
            "worker": ["127.0.0.1:0", "127.0.0.1:0"],
            "ps": ["127.0.0.1:5000", "127.0.0.1:5001"],
        }


def test_every_task_gets_token_run_id_and_lane() -> None:
    for task in plan_of(LaunchOptions(script="train.py", lane="tcp")).tasks:
        assert task.env["PARAMSERVER_TOKEN"] == "secret"
        assert task.env["PARAMSERVER_RUN_ID"] == "run"
        assert task.env["PARAMSERVER_LANE"] == "tcp"


def test_tasks_are_told_the_file_of_the_run() -> None:
    spec = plan(LaunchOptions(script="train.py"), [2222], "secret", "run", 8, run_file=Path("/run/of/mine.json"))
    assert {task.env["PARAMSERVER_RUN_FILE"] for task in spec.tasks} == {"/run/of/mine.json"}


def test_a_module_is_run_as_python_runs_it() -> None:
    chief = plan_of(LaunchOptions(script="package.train", args=("--lr", "1"), is_module=True)).tasks[1]
    assert chief.command[1:] == ("-m", "paramserver.launch.task", "-m", "package.train", "--lr", "1")


@pytest.mark.parametrize(
    ("workers", "cores", "share"), [(1, 8, "8"), (2, 8, "4"), (3, 8, "2"), (4, 2, "1"), (1, 1, "1")]
)
def test_chief_and_workers_share_the_cores(workers: int, cores: int, share: str) -> None:
    assert threads_of(LaunchOptions(script="train.py", workers=workers), cores) == [share, share]


def test_threads_that_are_asked_for_are_given_whatever_is_set() -> None:
    options = LaunchOptions(script="train.py", threads=3)
    assert threads_of(options, 8, ("OMP_NUM_THREADS",)) == ["3", "3"]


def test_a_thread_variable_of_the_user_is_left_alone() -> None:
    options = LaunchOptions(script="train.py")
    assert threads_of(options, 8, ("OMP_NUM_THREADS",)) == [None, None]
    assert threads_of(options, 8, ("MKL_NUM_THREADS",)) == ["8", None]


@pytest.mark.parametrize(
    ("already_set", "expected"),
    [((), "10000"), (("OMP_NUM_THREADS",), "10000"), (("GOMP_SPINCOUNT",), None), (("OMP_WAIT_POLICY",), None)],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(already_set: tuple[str, ...], expected: str) -> None:
    for task in plan_of(LaunchOptions(script="train.py"), 8, already_set).tasks:
        assert task.env.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize(
    ("already_set", "expected"), [((), "glibc.malloc.tcache_count=0"), (("GLIBC_TUNABLES",), None)]
)
def test_memory_is_kept_for_no_thread_unless_the_user_says_so(already_set: tuple[str, ...], expected: str) -> None:
    for task in plan_of(LaunchOptions(script="train.py"), 8, already_set).tasks:
        assert task.env.get("GLIBC_TUNABLES") == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ps": 0}, "ps: expected 1 or more, got 0; the variables live on parameter servers"),
        ({"workers": 0}, "workers: expected 1 or more, got 0; the chief counts as a worker"),
        ({"threads": 0}, "threads: expected 1 or more, got 0"),
        ({"lane": "udp"}, "lane: expected one of auto, shared-memory, tcp, got 'udp'"),
        ({"start_method": "fork"}, "start method: expected one of forkserver, spawn, got 'fork'"),
        ({"limits": Limits(grace=-1.0)}, "grace: expected seconds, 0 or more, got -1.0"),
        ({"limits": Limits(restarts=-1)}, "restarts: expected 0 or more, got -1"),
        ({"limits": Limits(shutdown_timeout=float("nan"))}, "shutdown_timeout: expected seconds, 0 or more, got nan"),
        ({"script": ""}, "expected the path of a script"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaunchOptions(**{"script": "train.py", **wrong})  # type: ignore[arg-type]  # wrong on purpose


def test_a_plan_needs_one_port_for_each_ps() -> None:
    with pytest.raises(ConfigError, match="ps_ports: expected 2, one for each ps, got 1"):
        plan(LaunchOptions(script="train.py", ps=2), [5000], "secret", "run", cores=1)


def test_what_only_some_tasks_have_in_their_environment_is_not_shared() -> None:
    tasks = (
        TaskSpec(TaskId(Role.PS, 0), ("true",), {"A": "1", "B": "1", "C": "1"}),
        TaskSpec(TaskId(Role.CHIEF, 0), ("true",), {"A": "1", "B": "2"}),
    )
    assert shared_environment(LaunchSpec("run", tasks)) == {"A": "1"}


def test_a_run_of_any_tasks_can_be_shown() -> None:
    spec = LaunchSpec("run", (TaskSpec(TaskId(Role.PS, 0), ("true",)),))
    assert describe(spec) == "run run: 1 task\n\n# ps:0\ntrue\n"
