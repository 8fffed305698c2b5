"""The cluster of a step of Slurm, from variables as Slurm 22.05 sets them."""

from __future__ import annotations

import os

import pytest

from paramserver.cluster import ClusterSpec, Role, SlurmClusterResolver, own_task, resolve
from paramserver.cluster.slurm import NUM_BLOCKS, assign_roles, parse_jobs, port_base_of
from paramserver.cluster.slurm_step import Step, read_step
from paramserver.errors import ConfigError

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURMD_NODENAME": "n1",
}
HET = {
    "SLURM_JOB_ID": "6",
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "n3",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1,2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_DISTRIBUTION": "block",
    "SLURMD_NODENAME": "n2",
}
BASE = 20000 + 16 * (31 * 7 + 2)


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM", "PARAMSERVER_", "TF_CONFIG")):
            monkeypatch.delenv(name)


def inside(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **changed: str | None) -> None:
    for name, value in {**variables, **changed}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, STEP)
    resolver = SlurmClusterResolver({"ps": 2, "chief": 1, "worker": 1, "evaluator": 1})
    assert resolver.cluster_spec() == ClusterSpec(
        {"ps": [f"n1:{BASE}", f"n2:{BASE + 1}"], "chief": ["n3:0"], "worker": ["n1:0"]}
    )
    assert (resolver.task_type, resolver.task_id) == ("worker", 0)
    assert resolver.master() == "n1:0"
    assert resolver.master("ps", 1, "grpc") == f"grpc://n2:{BASE + 1}"


def test_the_evaluator_is_outside_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(
        monkeypatch,
        STEP,
        SLURM_PROCID="4",
        SLURMD_NODENAME="n2",
        PARAMSERVER_SLURM_JOBS="ps=2,chief=1,worker=1,evaluator=1",
    )
    cluster, me = own_task(resolve())
    assert str(me) == "evaluator:0"
    assert "evaluator" not in cluster.jobs


def test_a_block_is_filled_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, STEP, SLURM_DISTRIBUTION="block:cyclic,Pack", SLURMD_NODENAME="n2")
    assert read_step(dict(os.environ)).nodes == ("n1", "n1", "n2", "n2", "n3")


def test_a_heterogeneous_step_is_in_the_order_of_its_components(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, HET)
    step = read_step(dict(os.environ))
    assert step.nodes == ("n3", "n3", "n1", "n1", "n2")


def test_a_step_on_one_component(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(
        monkeypatch,
        HET,
        SLURM_STEP_NODELIST="n[1-2]",
        SLURM_STEP_TASKS_PER_NODE="2,1",
        SLURM_STEP_NUM_TASKS="3",
        SLURM_PROCID="2",
    )
    assert read_step(dict(os.environ)).nodes == ("n1", "n1", "n2")


def test_components_without_a_node_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, HET, SLURM_JOB_NODELIST_HET_GROUP_0="n4")
    with pytest.raises(ConfigError, match=r"no component of the heterogeneous job has the nodes \['n3'\]"):
        read_step(dict(os.environ))


@pytest.mark.parametrize(
    ("jobs", "tasks"),
    [
        (None, "ps:0 chief:0 worker:0 worker:1 worker:2"),
        ("ps=2", "ps:0 ps:1 chief:0 worker:0 worker:1"),
        ("ps=2,evaluator=1", "ps:0 ps:1 evaluator:0 chief:0 worker:0"),
        ("chief=1,ps=2", "chief:0 ps:0 ps:1 worker:0 worker:1"),
        ("worker=3,ps=2", "worker:0 worker:1 worker:2 ps:0 ps:1"),
        ("ps=4", "ps:0 ps:1 ps:2 ps:3 chief:0"),
    ],
)
def test_roles_follow_the_order_of_the_jobs(monkeypatch: pytest.MonkeyPatch, jobs: str | None, tasks: str) -> None:
    inside(monkeypatch, STEP, PARAMSERVER_SLURM_JOBS=jobs)
    found = []
    for number, node in enumerate(("n1", "n2", "n3", "n1", "n2")):
        inside(monkeypatch, STEP, SLURM_PROCID=str(number), SLURMD_NODENAME=node, PARAMSERVER_SLURM_JOBS=jobs)
        found.append(str(own_task(resolve("slurm"))[1]))
    assert found == tasks.split()


@pytest.mark.parametrize("jobs", [{"ps": 5}, {"ps": 6}, {"worker": 5}, {"ps": 2, "worker": 2}, {"ps": 3, "worker": 3}])
def test_jobs_that_do_not_add_up(monkeypatch: pytest.MonkeyPatch, jobs: dict[str, int]) -> None:
    inside(monkeypatch, STEP)
    with pytest.raises(ConfigError, match="expected a ps, a chief or worker, and 5 tasks in all, as step 7.2 has on 3"):
        SlurmClusterResolver(jobs).cluster_spec()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ps", "expected a number of tasks for each job, as 'ps=2,evaluator=1', got 'ps'"),
        ("ps=2,ps=1", "expected a number of tasks for each job"),
        ("ps=x", "expected a number of tasks for each job"),
        ("pss=2", "unrecognized task_type: .* did you mean 'ps'"),
        ("ps=1,chief=2", "expected at most one chief, got 2"),
    ],
)
def test_malformed_jobs(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    inside(monkeypatch, STEP, PARAMSERVER_SLURM_JOBS=text)
    with pytest.raises(ConfigError, match=message):
        SlurmClusterResolver().cluster_spec()
    with pytest.raises(ConfigError, match="ps: expected a number of tasks, 0 or more, got -1"):
        SlurmClusterResolver({"ps": -1})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set; start the tasks with srun"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID: expected a number, got 'x'"),
        ({"SLURM_PROCID": "5"}, "SLURM_PROCID is 5, but step 7.2 has 5 tasks"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST or SLURM_JOB_NODELIST or SLURM_NODELIST is not set"),
        ({"SLURM_STEP_NODELIST": "n[1-3"}, r"SLURM_STEP_NODELIST: expected hosts such as .* got 'n\[1-3'"),
        ({"SLURM_STEP_NODELIST": "n[1-2]"}, "one number of tasks for each node, got 3 in SLURM_STEP_TASKS_PER_NODE"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2x3"}, "SLURM_STEP_TASKS_PER_NODE: expected numbers such as"),
        ({"SLURM_STEP_NUM_TASKS": "6"}, r"SLURM_STEP_NUM_TASKS is 6, but .* adds up to 5"),
        ({"SLURM_DISTRIBUTION": "plane"}, "distributed by block or cyclic, got SLURM_DISTRIBUTION=plane"),
        ({"SLURMD_NODENAME": "n2"}, "expected task 3 of step 7.2 on n1, got n2: the tasks are not distributed as"),
    ],
)
def test_malformed_variables(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], message: str) -> None:
    inside(monkeypatch, STEP, **changed)
    with pytest.raises(ConfigError, match=message):
        SlurmClusterResolver().cluster_spec()


def test_outside_of_a_step_the_job_is_described_but_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_PROCID": "0"}
    inside(monkeypatch, job)
    resolver = SlurmClusterResolver(port_base=1000)
    assert resolver.cluster_spec() == ClusterSpec({"ps": ["n1:1000"], "chief": ["n1:0"], "worker": ["n2:0"]})
    with pytest.raises(ConfigError, match="in job 3, but it is no task of a step: .* start it with srun"):
        own_task(resolver)
    assert not resolve().cluster_spec()  # a program that is run in the script of a batch job is alone


@pytest.mark.parametrize(("text", "port"), [("", BASE), ("8000", 8000)])
def test_the_port_base(monkeypatch: pytest.MonkeyPatch, text: str, port: int) -> None:
    inside(monkeypatch, STEP, PARAMSERVER_SLURM_PORT_BASE=text)
    assert SlurmClusterResolver().cluster_spec().tasks(Role.PS)
    assert SlurmClusterResolver().master("ps", 0) == f"n1:{port}"
    assert SlurmClusterResolver(port_base=9).master("ps", 0) == "n1:9"


@pytest.mark.parametrize("text", ["x", "-1", "70000"])
def test_a_wrong_port_base(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    inside(monkeypatch, STEP, PARAMSERVER_SLURM_PORT_BASE=text)
    with pytest.raises(ConfigError, match="expected a port"):
        SlurmClusterResolver().cluster_spec()


def test_many_steps_and_jobs_have_ports_of_their_own() -> None:
    def base(job_id: int, step_id: int) -> int:
        return port_base_of(Step(job_id=job_id, step_id=step_id, nodes=("n",), task=0))

    near = {base(1000 + job, step) for job in range(24) for step in range(31)}
    assert len(near) == 24 * 31
    assert all(port >= 20000 and port + 15 < 32768 for port in near)
    assert NUM_BLOCKS % 31


def test_jobs_are_read_as_they_are_shown() -> None:
    step = Step(job_id=1, step_id=0, nodes=("n",) * 4, task=0)
    assert [str(task) for task in assign_roles(parse_jobs(" ps = 1 , chief=1", "jobs"), step)][:2] == [
        "ps:0",
        "chief:0",
    ]
