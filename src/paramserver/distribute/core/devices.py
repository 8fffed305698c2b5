"""Names of devices: ``cpu:1``, ``cuda:0``, ``/job:worker/task:2/device:GPU:0``, ``/job:ps/task:1``.

Rules
    * A device belongs to a task (``/job:J/task:N``) or, without one, to the task that says its name.
    * Several logical CPU devices of one task (``cpu:0``, ``cpu:1``) are the one CPU that torch knows: what they have
      apart is the replica that runs on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from paramserver.cluster import ClusterResolver, TaskId, TFConfigClusterResolver

_NAME = re.compile(
    r"(?:/job:(?P<job>\w+))?(?:/(?:replica:\d+/)?task:(?P<task>\d+))?"
    r"(?:/?(?:device:)?(?P<kind>cpu|gpu|cuda)(?::(?P<index>\d+))?)?",
    re.IGNORECASE,
)


def default_device() -> torch.device:
    """Where this thread makes tensors now, also inside ``with torch.device(...)``.

    >>> with torch.device("meta"):
    ...     default_device()
    device(type='meta')
    """
    return torch.empty(0).device  # torch.get_default_device() of torch 2.6 does not know of such a block


@dataclass(frozen=True)
class Device:
    """A device of a task.

    Attributes:
        job: The role of the task; empty for the present task.
        task: Its index; None for the present task.
        kind: ``CPU`` or ``GPU``.
        index: Which of that kind.
    """

    job: str = ""
    task: int | None = None
    kind: str = "CPU"
    index: int = 0

    @classmethod
    def parse(cls, name: str | torch.device | Device) -> Device:
        """A device by any of its names.

        >>> print(Device.parse("cpu:1"), Device.parse(torch.device("cuda", 2)), Device.parse("/job:ps/task:1"))
        /device:CPU:1 /device:GPU:2 /job:ps/task:1/device:CPU:0

        Raises:
            ValueError: If it names no device.
        """
        if isinstance(name, Device):
            return name
        found = _NAME.fullmatch(str(name))
        if not str(name) or found is None:
            raise ValueError(f"{str(name)!r} names no device; expected one like 'cpu:0', 'cuda:0' or '/job:ps/task:0'")
        job, task, kind, index = found.group("job", "task", "kind", "index")
        return cls(
            job=job or "",
            task=None if task is None else int(task),
            kind="CPU" if (kind or "cpu").lower() == "cpu" else "GPU",
            index=int(index or 0),
        )

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors lie, seen from its own task."""
        return torch.device("cpu") if self.kind == "CPU" else torch.device("cuda", self.index)

    def is_remote(self, job: str, task: int | None) -> bool:
        """Whether it belongs to another task than ``job:task``.

        >>> Device.parse("/job:worker/task:1").is_remote("worker", 0), Device.parse("cpu:0").is_remote("worker", 0)
        (True, False)
        """
        return bool(self.job) and (self.job, self.task or 0) != (job, task or 0)

    def __str__(self) -> str:
        job = f"/job:{self.job}" if self.job else ""
        task = "" if self.task is None else f"/task:{self.task}"
        return f"{job}{task}/device:{self.kind}:{self.index}"


@dataclass(frozen=True)
class DeviceChoice:
    """Where a worker computes, and where variables lie that no ps task holds.

    Attributes:
        compute: A device for each replica, of no task yet.
        parameter: The device of the variables of a strategy without a cluster.
    """

    compute: tuple[Device, ...]
    parameter: Device

    @classmethod
    def of(cls, resolver: ClusterResolver, compute: Sequence[str] | None, parameter: str | None) -> DeviceChoice:
        """The devices that a program names, else the accelerators that the resolver knows, else the CPU.

        Raises:
            ValueError: If a name is no device's, or no compute device is named.
        """
        if compute is not None and (isinstance(compute, str) or not compute):
            raise ValueError(f"compute_devices must be a list of at least one device, got {compute!r}")
        devices = tuple(map(Device.parse, compute)) if compute else _accelerators(resolver)
        single = devices[0] if len(devices) == 1 else Device()
        return cls(devices, Device.parse(parameter) if parameter else single)

    def of_task(self, task: TaskId | None) -> tuple[Device, ...]:
        """The compute devices, as those of a task."""
        if task is None:
            return self.compute
        return tuple(replace(device, job=str(task.role), task=task.index) for device in self.compute)


def _accelerators(resolver: ClusterResolver) -> tuple[Device, ...]:
    if isinstance(resolver, TFConfigClusterResolver):
        counts = {"GPU": torch.cuda.device_count()}  # TF_CONFIG says nothing of them
    else:
        counts = dict(resolver.num_accelerators())
    kind = "GPU" if counts.get("GPU") else "CPU"
    return tuple(Device(kind=kind, index=index) for index in range(counts.get(kind) or 1))
