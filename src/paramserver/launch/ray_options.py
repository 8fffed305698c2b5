"""The options of a launch on Ray, and resources as text, such as ``CPU=2,GPU=1,memory=4GiB``. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from paramserver.cluster.spec import expected_one_of
from paramserver.errors import ConfigError

STRATEGIES = ("SPREAD", "PACK", "STRICT_SPREAD")
"""The strategies of a placement group: on as many nodes as possible, on as few, or each task on a node of its own."""

AUTO_ADDRESS = "auto"
"""Address of the cluster that ``RAY_ADDRESS`` names, or that runs on this machine."""

ONE_CPU: Mapping[str, float] = MappingProxyType({"CPU": 1.0})

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]i?B)?")
_MEMORY = "memory"
_OF_NODES = {"cpu": "CPU", "gpu": "GPU", "memory": "memory"}
"""The resources that every cluster has, as Ray writes them."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What a launch on Ray has in addition to the options of all launches.

    Attributes:
        ps_resources: Resources of each ps by name: ``CPU``, ``GPU``, ``memory`` in bytes, and any that nodes have.
        worker_resources: Resources of each chief, worker and evaluator.
        placement: One of `STRATEGIES`.
        address: The address of the cluster, ``host:port``, or ``auto``.
        working_dir: A folder to copy to all nodes, in which the tasks run; None for the launcher's folder on each node.
        start_timeout: Seconds to wait for resources.
    """

    ps_resources: Mapping[str, float] = field(default_factory=lambda: ONE_CPU)
    worker_resources: Mapping[str, float] = field(default_factory=lambda: ONE_CPU)
    placement: str = "SPREAD"
    address: str = AUTO_ADDRESS
    working_dir: Path | None = None
    start_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.placement not in STRATEGIES:
            raise ConfigError(f"placement: {expected_one_of(STRATEGIES, self.placement)}")
        if self.address.startswith("ray://"):
            raise ConfigError(
                f"address: expected that of the cluster, host:port (6379 by default), got {self.address!r}, which is "
                "for Ray Client; run the launcher in the cluster: ray job submit -- paramserver launch --on ray ..."
            )
        if self.working_dir is not None and not self.working_dir.is_dir():
            raise ConfigError(f"working dir: expected a folder, got {str(self.working_dir)!r}")
        if not self.start_timeout >= 0:
            raise ConfigError(f"start timeout: expected seconds, 0 or more, got {self.start_timeout}")
        for what, resources in (("ps resources", self.ps_resources), ("worker resources", self.worker_resources)):
            check_resources(resources, what)


def parse_resources(text: str, what: str) -> dict[str, float]:
    """Return resources by name.

    Args:
        text: Names and amounts; an amount of memory may have a unit, such as GiB or GB.
        what: What they are, for messages.

    Raises:
        ConfigError: If the text is malformed.

    >>> parse_resources("CPU=2,GPU=0.5,memory=4GiB", "resources")
    {'CPU': 2.0, 'GPU': 0.5, 'memory': 4294967296.0}
    """
    resources: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = (each.strip() for each in part.partition("="))
        match = _AMOUNT.fullmatch(amount)
        if not name or name in resources or match is None:
            raise ConfigError(f"{what}: expected names and amounts, as in 'CPU=2,GPU=1,memory=4GiB', got {text!r}")
        if match[2] and name.lower() != _MEMORY:
            raise ConfigError(f"{what}: {name}: expected a number, got {amount!r}; only memory has units")
        resources[name] = float(match[1]) * _UNITS[match[2] or ""]
    check_resources(resources, what)
    return resources


def check_resources(resources: Mapping[str, float], what: str) -> None:
    """Raise ConfigError if there is no resource, or an amount or name that Ray does not have."""
    for name, amount in resources.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
            raise ConfigError(f"{what}: {name}: expected a number, 0 or more, got {amount!r}")
        right = _OF_NODES.get(name.lower(), name)
        if right != name:
            raise ConfigError(f"{what}: there is no {name!r}; did you mean {right!r}?")
        if amount > 1 and amount != int(amount):
            raise ConfigError(f"{what}: {name}: expected a whole number, or one below 1, got {amount:g}")
    if not any(resources.values()):
        raise ConfigError(f"{what}: expected at least one resource, such as 'CPU=1', got {dict(resources)}")


def show_resources(resources: Mapping[str, float]) -> str:
    """Return resources as `parse_resources` takes them.

    >>> show_resources({"CPU": 2.0, "memory": 2**31})
    'CPU=2,memory=2GiB'
    """
    return ",".join(f"{name}={_show_amount(name, amount)}" for name, amount in resources.items())


def _show_amount(name: str, amount: float) -> str:
    if name != _MEMORY:
        return f"{amount:g}"
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if amount >= _UNITS[unit]:
            return f"{round(amount / _UNITS[unit], 1):g}{unit}"
    return f"{amount:g}"
