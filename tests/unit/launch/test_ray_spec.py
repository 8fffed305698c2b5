"""The placement group and the actors that a launch on Ray starts, and the resources that it misses."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Limits
from paramserver.launch.ray_options import RayOptions, parse_resources, show_resources
from paramserver.launch.ray_spec import (
    Node,
    RaySpec,
    cluster_of,
    describe_actors,
    describe_need,
    missing,
    not_placed,
    plan_actors,
)
from paramserver.launch.spec import LaunchOptions

OPTIONS = LaunchOptions(
    script="train.py",
    args=("--name", "two words"),
    on="ray",
    workers=2,
    evaluator=True,
    ray=RayOptions(ps_resources={"CPU": 2, "memory": 2**32}, worker_resources={"CPU": 1, "GPU": 0.5, "fast": 1}),
)
NODES = [Node("10.0.0.1", {"CPU": 4.0, "memory": 2**34}), Node("10.0.0.2", {"CPU": 2.0, "memory": 2**34})]

DRY_RUN = """\
run 1f0c: 4 tasks as actors on Ray, cluster auto

# placement group paramserver-1f0c, SPREAD
0: CPU=2,memory=4GiB
1: CPU=1,GPU=0.5,fast=1
2: CPU=1,GPU=0.5,fast=1
3: CPU=1,GPU=0.5,fast=1

# ps:0, an actor on bundle 0, in the folder of the launcher
PARAMSERVER_TOKEN='***' \\
PARAMSERVER_RUN_ID=1f0c \\
PARAMSERVER_LANE=auto \\
PARAMSERVER_RAY_RUN=paramserver-1f0c \\
PYTHONUNBUFFERED=1 \\
OMP_NUM_THREADS=2 \\
MKL_NUM_THREADS=2 \\
GOMP_SPINCOUNT=10000 \\
GLIBC_TUNABLES=glibc.malloc.tcache_count=0 \\
python -m paramserver server

# chief:0, an actor on bundle 1, in the folder of the launcher
PARAMSERVER_TOKEN='***' \\
PARAMSERVER_RUN_ID=1f0c \\
PARAMSERVER_LANE=auto \\
PARAMSERVER_RAY_RUN=paramserver-1f0c \\
PYTHONUNBUFFERED=1 \\
OMP_NUM_THREADS=1 \\
MKL_NUM_THREADS=1 \\
GOMP_SPINCOUNT=10000 \\
GLIBC_TUNABLES=glibc.malloc.tcache_count=0 \\
python -m paramserver.launch.task train.py --name 'two words'
"""


def planned(options: LaunchOptions = OPTIONS) -> RaySpec:
    return plan_actors(options, "secret", "1f0c")


def test_a_dry_run_shows_the_placement_group_and_each_actor_but_not_the_token() -> None:
    text = describe_actors(planned())
    assert text.startswith(DRY_RUN)
    assert [line for line in text.splitlines() if line.startswith("# worker:0, an actor on bundle 2")]
    assert "secret" not in text


def test_a_folder_that_is_copied_is_shown(tmp_path: Path) -> None:
    options = LaunchOptions(script="train.py", on="ray", ray=RayOptions(working_dir=tmp_path, address="head:6379"))
    text = describe_actors(planned(options))
    assert f"# chief:0, an actor on bundle 1, in a copy of {tmp_path}\n" in text
    assert "cluster head:6379" in text


def test_each_task_has_a_bundle_and_ps_tasks_are_first() -> None:
    spec = planned()
    assert list(map(str, spec.tasks)) == ["ps:0", "chief:0", "worker:0", "evaluator:0"]
    assert spec.bundles[0] == {"CPU": 2, "memory": 2**32}
    assert spec.bundles[1:] == [{"CPU": 1, "GPU": 0.5, "fast": 1}] * 3


def test_resources_of_zero_are_left_out_of_a_bundle() -> None:
    ray = RayOptions(ps_resources={"CPU": 0, "memory": 1e9})
    assert planned(LaunchOptions(script="train.py", on="ray", ray=ray)).bundles[0] == {"memory": 1e9}


def test_the_token_is_in_the_environment_of_the_processes_only() -> None:
    spec = planned()
    assert {actor.env["PARAMSERVER_TOKEN"] for actor in spec.actors} == {"secret"}
    assert not [word for actor in spec.actors for word in actor.arguments if "secret" in word]


def test_options_go_to_the_tasks() -> None:
    options = LaunchOptions(
        script="package.train",
        is_module=True,
        on="ray",
        threads=3,
        lane="tcp",
        heartbeat_timeout=5.0,
        limits=Limits(restarts=2),
    )
    spec = planned(options)
    chief = spec.actors[1]
    assert chief.arguments == ("-m", "paramserver.launch.task", "-m", "package.train")
    assert chief.env.items() >= {
        ("OMP_NUM_THREADS", "3"),
        ("PARAMSERVER_LANE", "tcp"),
        ("PARAMSERVER_HEARTBEAT_TIMEOUT", "5.0"),
    }
    assert spec.limits.restarts == 2


def test_the_cluster_has_the_present_addresses_of_ps_tasks_and_no_evaluator() -> None:
    cluster = cluster_of(planned().tasks, {TaskId(Role.PS, 0): "10.0.0.2:4711"})
    assert cluster == {"ps": ["10.0.0.2:4711"], "chief": ["127.0.0.1:0"], "worker": ["127.0.0.1:0"]}


@pytest.mark.parametrize(
    ("bundles", "strategy", "text"),
    [
        ([{"CPU": 4.0}, {"CPU": 2.0}], "SPREAD", ""),
        ([{"CPU": 5.0}], "SPREAD", "no node has CPU=5, which a task needs"),
        ([{"CPU": 1.0, "GPU": 1.0}], "PACK", "no node has CPU=1,GPU=1, which a task needs"),
        ([{"CPU": 1.0}] * 2, "STRICT_SPREAD", ""),
        ([{"CPU": 1.0}] * 3, "STRICT_SPREAD", "3 tasks need 3 nodes with STRICT_SPREAD, and there are 2"),
        ([{"CPU": 2.0}] * 4, "SPREAD", "the tasks need CPU=8 in all, and the nodes have CPU=6"),
    ],
)
def test_what_is_missing(bundles: list[dict[str, float]], strategy: str, text: str) -> None:
    assert missing(bundles, strategy, NODES) == text


def test_a_cluster_without_nodes_misses_everything() -> None:
    assert missing([{"CPU": 1.0}], "SPREAD", []) == "no node has CPU=1, which a task needs"
    assert describe_need(planned(), []).endswith("there are: no nodes")


def test_the_error_says_what_is_needed_and_what_is_there() -> None:
    message = str(not_placed(planned(), NODES))
    assert (
        "no place for the tasks within 60 s: no node has CPU=1,GPU=0.5,fast=1, which a task needs; needed: " in message
    )
    assert "1 x ps CPU=2,memory=4GiB; 1 x chief CPU=1,GPU=0.5,fast=1" in message
    assert "10.0.0.2 CPU=2,GPU=0,fast=0,memory=16GiB" in message
    small = planned(LaunchOptions(script="train.py", on="ray"))
    assert "within 60 s: other runs have the resources; needed: 1 x ps CPU=1" in str(not_placed(small, NODES))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected names and amounts, as in 'CPU=2,GPU=1,memory=4GiB', got ''"),
        ("CPU", "expected names and amounts"),
        ("CPU=", "expected names and amounts"),
        ("CPU=-1", "expected names and amounts"),
        ("CPU=1,CPU=2", "expected names and amounts"),
        ("CPU=2GiB", "CPU: expected a number, got '2GiB'; only memory has units"),
        ("cpu=2", "there is no 'cpu'; did you mean 'CPU'?"),
        ("Memory=2GB", "there is no 'Memory'; did you mean 'memory'?"),
        ("CPU=1.5", "CPU: expected a whole number, or one below 1, got 1.5"),
        ("CPU=0", "expected at least one resource, such as 'CPU=1'"),
    ],
)
def test_malformed_resources_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("?", r"\?")):
        parse_resources(text, "--ps-resources")


@pytest.mark.parametrize("text", ["CPU=1", "CPU=0.5,GPU=2,memory=512MiB", "tpu=1,memory=1.5GiB", "memory=100"])
def test_resources_are_shown_as_they_are_read(text: str) -> None:
    assert show_resources(parse_resources(text, "resources")) == text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"placement": "SPREED"}, "placement: .*did you mean 'SPREAD'"),
        ({"address": "ray://head:10001"}, "which is for Ray Client; run the launcher in the cluster"),
        ({"working_dir": Path("/is/not/there")}, "working dir: expected a folder"),
        ({"start_timeout": -1.0}, "start timeout: expected seconds, 0 or more, got -1"),
        ({"ps_resources": {"CPU": True}}, "ps resources: CPU: expected a number, 0 or more, got True"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        RayOptions(**options)


def test_options_of_ray_are_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match="launch --on local: the options of Ray are for --on ray only"):
        LaunchOptions(script="train.py", ray=RayOptions())
