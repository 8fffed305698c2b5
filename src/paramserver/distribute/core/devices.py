"""Names of devices: ``cpu:1``, ``cuda:0``, ``/job:worker/task:2/device:GPU:0``, ``/job:ps/task:1``.

Rules
    * A device belongs to a task (``/job:J/task:N``). A name without a task means the task that uses the name.
    * Several logical CPU devices of one task (``cpu:0``, ``cpu:1``) are one CPU to torch: they differ only in the
      replica that runs on them.
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
    """Return the device on which this thread makes tensors now, also inside ``with torch.device(...)``.

    >>> with torch.device("meta"):
    ...     default_device()
    device(type='meta')
    """
    return torch.empty(0).device  # torch.get_default_device() of torch 2.6 ignores such a block


@dataclass(frozen=True)
class Device:
    """A device of a task.

    Attributes:
        job: The role of the task; empty for the present task.
        task: The index of the task; None for the present task.
        kind: ``CPU`` or ``GPU``.
        index: The index among the task's devices of that kind.
    """

    job: str = ""
    task: int | None = None
    kind: str = "CPU"
    index: int = 0

    @classmethod
    def parse(cls, name: str | torch.device | Device) -> Device:
        """Return the device of a name, in any of the forms above.

        >>> print(Device.parse("cpu:1"), Device.parse(torch.device("cuda", 2)), Device.parse("/job:ps/task:1"))
        /device:CPU:1 /device:GPU:2 /job:ps/task:1/device:CPU:0

        Raises:
            ValueError: If the name is not the name of a device.
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
        """The torch device of its tensors, as seen by its own task."""
        return torch.device("cpu") if self.kind == "CPU" else torch.device("cuda", self.index)

    def is_remote(self, job: str, task: int | None) -> bool:
        """Return whether the device belongs to another task than ``job:task``.

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
    """The devices on which a worker computes, and the device of variables without a cluster.

    Attributes:
        compute: A device for each replica, without a task.
        parameter: The device of the variables of a strategy without a cluster.
    """

    compute: tuple[Device, ...]
    parameter: Device

    @classmethod
    def of(cls, resolver: ClusterResolver, compute: Sequence[str] | None, parameter: str | None) -> DeviceChoice:
        """Return the devices that a program names, else the accelerators that the resolver knows, else the CPU.

        Raises:
            ValueError: If a name is not the name of a device, or ``compute`` is empty.
        """
        if compute is not None and (isinstance(compute, str) or not compute):
            raise ValueError(f"compute_devices must be a list of at least one device, got {compute!r}")
        devices = tuple(map(Device.parse, compute)) if compute else _accelerators(resolver)
        single = devices[0] if len(devices) == 1 else Device()
        return cls(devices, Device.parse(parameter) if parameter else single)

    def of_task(self, task: TaskId | None) -> tuple[Device, ...]:
        """Return the compute devices with the name of a task."""
        if task is None:
            return self.compute
        return tuple(replace(device, job=str(task.role), task=task.index) for device in self.compute)


def _accelerators(resolver: ClusterResolver) -> tuple[Device, ...]:
    if isinstance(resolver, TFConfigClusterResolver):
        counts = {"GPU": torch.cuda.device_count()}  # TF_CONFIG does not name accelerators
    else:
        counts = dict(resolver.num_accelerators())
    kind = "GPU" if counts.get("GPU") else "CPU"
    return tuple(Device(kind=kind, index=index) for index in range(counts.get(kind) or 1))
