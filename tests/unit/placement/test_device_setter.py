"""Which device a thing of a program goes to: P20 to P28."""

import logging

import pytest

from paramserver.cluster import ClusterSpec
from paramserver.distribute.core.devices import Device
from paramserver.layout.variables import VariableSpec
from paramserver.placement import Greedy
from paramserver.placement.device_setter import Op, replica_device_setter

CLUSTER = {"ps": ["a:1", "b:1"], "worker": ["c:1"]}


def variables(place, *devices):
    return [place(Op("variable", device)) for device in devices]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"ps_tasks": 0},
        {"cluster": {"worker": ["c:1"]}},
        {"cluster": CLUSTER, "ps_device": "/job:moon"},
        {"cluster": {}},
    ],
)
def test_p20_without_ps_tasks_nothing_is_placed(arguments):
    assert replica_device_setter(**arguments) is None


def test_p20_a_cluster_without_ps_counts_more_than_ps_tasks():
    assert replica_device_setter(ps_tasks=3, cluster={"worker": ["c:1"]}) is None


@pytest.mark.parametrize("cluster", [CLUSTER, ClusterSpec(CLUSTER), {"ps": {"0": "a:1", "1": "b:1"}}])
def test_p21_the_cluster_says_how_many_ps_tasks_there_are(cluster):
    place = replica_device_setter(ps_tasks=7, cluster=cluster)
    assert variables(place, "", "", "") == ["/job:ps/task:0", "/job:ps/task:1", "/job:ps/task:0"]


def test_p21_a_protobuf_of_a_cluster_is_taken():
    class Job:
        name, tasks = "ps", {0: "a:1"}

    class Proto:
        job = (Job(),)

    assert variables(replica_device_setter(cluster=Proto()), "", "") == ["/job:ps/task:0"] * 2


def test_what_is_no_cluster_is_refused():
    with pytest.raises(TypeError, match="cluster: expected a dict"):
        replica_device_setter(cluster=["a:1"])


@pytest.mark.parametrize("strategy", [3, "greedy", [0]])
def test_p22_a_strategy_is_a_function(strategy):
    with pytest.raises(TypeError, match="ps_strategy: expected a function"):
        replica_device_setter(ps_tasks=1, ps_strategy=strategy)


def test_p23_only_variables_and_tables_go_to_ps_tasks():
    place = replica_device_setter(ps_tasks=2)
    found = [place(Op(kind)) for kind in ("variable", "matmul", "table", "constant")]
    assert found == ["/job:ps/task:0", "/job:worker", "/job:ps/task:1", "/job:worker"]


def test_p23_a_program_says_which_ops_go_to_ps_tasks():
    place = replica_device_setter(ps_tasks=2, ps_ops=["queue"])
    assert [place(Op(kind)) for kind in ("variable", "queue")] == ["/job:worker", "/job:ps/task:0"]


def test_p24_an_op_of_another_job_stays_there_and_takes_no_turn():
    place = replica_device_setter(ps_tasks=2)
    found = variables(place, "", "/job:worker", "/job:worker/task:3/cpu:1", "", "/job:ps", "/job:other/gpu:0")
    assert found == [
        "/job:ps/task:0",
        "/job:worker",
        "/job:worker/task:3/device:CPU:1",
        "/job:ps/task:1",
        "/job:ps/task:0",
        "/job:other/device:GPU:0",
    ]


def test_p24_a_ps_device_without_a_job_has_no_tasks_to_choose_from():
    place = replica_device_setter(ps_tasks=2, ps_device="/cpu:0")
    assert variables(place, "", "/job:ps") == ["/device:CPU:0", "/job:ps/device:CPU:0"]


def test_p25_what_a_device_lacks_is_filled_in():
    place = replica_device_setter(ps_tasks=3)
    assert variables(place, "/job:ps", "/job:ps/cpu:1", "/job:ps/task:0") == [
        "/job:ps/task:0",
        "/job:ps/task:1/device:CPU:1",
        "/job:ps/task:0",
    ]
    assert place(Op("matmul", "/task:3")) == "/job:worker/task:3"


def test_p25_without_merging_a_device_stays_as_it_is_and_one_is_warned(caplog):
    with caplog.at_level(logging.WARNING):
        place = replica_device_setter(ps_tasks=2, merge_devices=False)
    assert "merge_devices=False is deprecated" in caplog.text
    assert variables(place, "/job:ps", "/cpu:0", "", "") == ["/job:ps", "/cpu:0", "/job:ps/task:0", "/job:ps/task:1"]
    assert place(Op("matmul", "/cpu:0")) == "/cpu:0"
    assert place(Op("matmul")) == "/job:worker"


@pytest.mark.parametrize("cpu", ["/cpu:0", "cpu:0", "/device:CPU:0", "/CPU:0"])
def test_p26_a_kind_of_device_is_merged(cpu):
    place = replica_device_setter(ps_tasks=2)
    found = [place(Op(kind, cpu)) for kind in ("variable", "variable", "matmul")]
    assert found == ["/job:ps/task:0/device:CPU:0", "/job:ps/task:1/device:CPU:0", "/job:worker/device:CPU:0"]
    assert Device.parse(found[0]) == Device.parse("/job:ps/task:0/cpu:0")


def test_p27_jobs_may_have_any_name():
    place = replica_device_setter(cluster={"moon": ["a:1", "b:1"]}, ps_device="/job:moon", worker_device="/job:sun")
    found = [place(Op(kind)) for kind in ("variable", "variable", "matmul")]
    assert found == ["/job:moon/task:0", "/job:moon/task:1", "/job:sun"]


@pytest.mark.parametrize("worker_device", ["", "/job:worker/replica:0/task:1/gpu:2"])
def test_p27_a_worker_device_may_be_any(worker_device):
    place = replica_device_setter(ps_tasks=1, worker_device=worker_device)
    assert place(Op("matmul")) == worker_device.replace("gpu:2", "device:GPU:2")


def test_p28_ps_tasks_take_turns_and_what_initializes_a_variable_takes_none():
    place = replica_device_setter(ps_tasks=2)
    first = place(Op("variable"))
    assert place(Op("assign", device=first)) == first
    assert place(Op("variable")) == "/job:ps/task:1"


def test_p30_a_strategy_may_look_at_the_variable():
    greedy = Greedy().start(2)
    place = replica_device_setter(ps_tasks=2, ps_strategy=lambda op: greedy(op.variable))
    shapes = [(2, 2), (2, 1), (2, 2), (1, 3)]
    found = [place(Op("variable", variable=VariableSpec("v", shape, "float32"))) for shape in shapes]
    assert found == [f"/job:ps/task:{task}" for task in (0, 1, 1, 0)]


@pytest.mark.parametrize("device", ["/job:", "/job:ps/tpu:0", "disk", "/task:0/1"])
def test_what_is_no_device_is_refused(device):
    place = replica_device_setter(ps_tasks=1)
    with pytest.raises(ValueError, match="names no device"):
        place(Op("variable", device))
    with pytest.raises(ValueError, match="names no device"):
        replica_device_setter(ps_tasks=1, ps_device=device)
