"""CentralStorageStrategy: one process, its variables on one device, its replicas on several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paramserver.cluster import ClusterSpec, SimpleClusterResolver
from paramserver.distribute.parameter_server import ParameterServerStrategy


class CentralStorageStrategy(ParameterServerStrategy):
    """Training in one process: all variables are on one device, and each compute device has a replica.

    This is a `ParameterServerStrategy` without a cluster, on devices that the program chooses. A program that works
    with one of the two works with the other.

    Args:
        compute_devices: One replica runs on each; by default all GPUs, or the CPU if there are none. ``cpu:0``,
            ``cpu:1`` and so on are logical devices: replicas that share the CPU.
        parameter_device: The device of the variables; by default the one compute device, or the CPU if there are
            several.
        options: Further options of `ParameterServerStrategy`.

    Raises:
        ValueError: If a name is not the name of a device.

    >>> strategy = CentralStorageStrategy(compute_devices=["cpu:0", "cpu:1"])
    >>> strategy.num_replicas_in_sync, strategy.extended.parameter_devices
    (2, ('/device:CPU:0',))
    """

    def __init__(
        self,
        compute_devices: Sequence[str] | None = None,
        parameter_device: str | None = None,
        **options: Any,
    ) -> None:
        local = SimpleClusterResolver(ClusterSpec({}), num_accelerators=_local_gpus())
        super().__init__(local, compute_devices=compute_devices, parameter_device=parameter_device, **options)

    @classmethod
    def from_num_gpus(cls, count: int) -> CentralStorageStrategy:
        """Return a strategy over the first ``count`` GPUs, or over the CPU if ``count`` is 0."""
        return cls([f"cuda:{index}" for index in range(count)] or ["cpu:0"])


def _local_gpus() -> dict[str, int]:
    return {"GPU": torch.cuda.device_count()}
