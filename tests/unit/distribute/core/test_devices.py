"""Names of devices, and which of them a worker uses."""

from __future__ import annotations

import pytest
import torch

import paramserver as ps
from paramserver.cluster import TaskId
from paramserver.distribute.core.devices import Device, DeviceChoice

LOCAL = ps.SimpleClusterResolver(ps.ClusterSpec({}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", "/device:CPU:0"),
        ("cpu:1", "/device:CPU:1"),
        ("CPU:1", "/device:CPU:1"),
        ("gpu:2", "/device:GPU:2"),
        ("cuda", "/device:GPU:0"),
        ("cuda:3", "/device:GPU:3"),
        ("/device:GPU:1", "/device:GPU:1"),
        ("device:cpu:0", "/device:CPU:0"),
        ("/gpu:1", "/device:GPU:1"),
        ("/job:ps", "/job:ps/device:CPU:0"),
        ("/job:ps/task:1", "/job:ps/task:1/device:CPU:0"),
        ("/job:worker/task:12/device:GPU:3", "/job:worker/task:12/device:GPU:3"),
        ("/job:worker/replica:0/task:2/device:cpu:0", "/job:worker/task:2/device:CPU:0"),
        (torch.device("cuda", 1), "/device:GPU:1"),
        (torch.device("cpu"), "/device:CPU:0"),
        (Device("ps", 2), "/job:ps/task:2/device:CPU:0"),
    ],
    ids=str,
)
def test_a_device_has_one_name_and_is_found_by_any(name: str | torch.device | Device, expected: str) -> None:
    device = Device.parse(name)
    assert str(device) == expected
    assert Device.parse(expected) == device


@pytest.mark.parametrize("name", ["", "tpu:0", "cpu:x", "cpu:-1", "cpu:0 ", "meta", "/job:ps/task:a", "ps:0", "0"])
def test_what_names_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names no device; expected one like 'cpu:0', 'cuda:0' or '/job:ps/task:0'"):
        Device.parse(name)


def test_logical_devices_are_the_one_cpu_of_torch() -> None:
    assert {Device.parse(f"cpu:{index}").torch_device for index in range(3)} == {torch.device("cpu")}
    assert Device.parse("gpu:1").torch_device == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("cpu:0", False),
        ("/job:worker/task:1", False),
        ("/job:worker/task:1/device:GPU:7", False),
        ("/job:worker/task:0", True),
        ("/job:worker", True),
        ("/job:ps/task:1", True),
        ("/job:chief/task:1", True),
    ],
)
def test_a_device_belongs_to_its_task(name: str, remote: bool) -> None:
    """One without a task belongs to the task that says its name."""
    assert Device.parse(name).is_remote("worker", 1) is remote


@pytest.mark.parametrize("compute", [[], (), "cpu:0"])
def test_at_least_one_compute_device_is_named(compute: list[str]) -> None:
    with pytest.raises(ValueError, match="compute_devices must be a list of at least one device, got"):
        DeviceChoice.of(LOCAL, compute, None)


def test_devices_become_those_of_a_task() -> None:
    """C13."""
    choice = DeviceChoice.of(LOCAL, ["cpu:0", "cuda:1"], None)
    assert choice.of_task(None) == choice.compute
    assert list(map(str, choice.of_task(TaskId.parse("worker:2")))) == [
        "/job:worker/task:2/device:CPU:0",
        "/job:worker/task:2/device:GPU:1",
    ]
