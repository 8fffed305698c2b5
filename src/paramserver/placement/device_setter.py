"""The choice of a device for an operation by its kind: variables and tables go to ps tasks, all others to the worker.

Pure functions of device names, such as ``/job:ps/task:1/device:CPU:0``, of which any part may be missing.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from paramserver.cluster import ClusterSpec
from paramserver.errors import ConfigError
from paramserver.layout.variables import VariableSpec

logger = logging.getLogger(__name__)

PS_OPS = ("variable", "table")
"""Kinds of operations that go to ps tasks."""

_PARTS = ("job", "replica", "task", "device")
_NAMED_PART = re.compile(r"(?P<part>job|replica|task):(?P<value>\w+)")
_DEVICE = re.compile(r"(?:device:)?(?P<kind>cpu|gpu|cuda)(?::(?P<index>\d+))?", re.IGNORECASE)


class Op(NamedTuple):
    """An operation that needs a device.

    Attributes:
        kind: The kind of the operation, such as ``variable``, ``table`` or ``matmul``.
        device: The device that the program asks for; any part of its name may be missing.
        variable: The variable of the operation, for strategies that use its name or size.
    """

    kind: str
    device: str = ""
    variable: VariableSpec | None = None


DeviceSetter = Callable[[Op], str]
"""Function that returns the device of the next operation. Call it in creation order, because it keeps count."""


def replica_device_setter(
    ps_tasks: int = 0,
    ps_device: str = "/job:ps",
    worker_device: str = "/job:worker",
    merge_devices: bool = True,
    cluster: object = None,
    ps_ops: Collection[str] | None = None,
    ps_strategy: Callable[[Op], int] | None = None,
) -> DeviceSetter | None:
    """Return a function from an op to its device; None if there are no ps tasks, so that nothing has to be placed.

    The parts that an op's own device names are kept: an op of another job stays there, and takes no turn of a ps.

    Args:
        ps_tasks: Number of ps tasks; ignored if there is a cluster.
        ps_device: Device for variables; the tasks of its job take turns.
        worker_device: Device for all other ops.
        merge_devices: Whether to fill in the missing parts of an op's device; otherwise an op with any part is left
            alone.
        cluster: A ClusterSpec, or anything that one is made from, which determines the number of ps tasks.
        ps_ops: Kinds of ops that go to ps tasks; variables and tables by default.
        ps_strategy: Returns the index of the ps task for an op; by default they take turns.

    Raises:
        TypeError: If ``ps_strategy`` cannot be called, or ``cluster`` does not describe a cluster.
        ConfigError: If a name is not that of a device; for the device of an op, when the op is placed.

    >>> place = replica_device_setter(ps_tasks=2)
    >>> [place(Op(kind)) for kind in ("variable", "variable", "matmul", "table")]
    ['/job:ps/task:0', '/job:ps/task:1', '/job:worker', '/job:ps/task:0']
    >>> place(Op("variable", device="/cpu:0"))
    '/job:ps/task:1/device:CPU:0'
    """
    ps, worker = _parts(ps_device), _parts(worker_device)
    count = ps_tasks if cluster is None else _num_tasks(cluster, ps.get("job", ""))
    if not count:
        return None
    if ps_strategy is not None and not callable(ps_strategy):
        raise TypeError(f"ps_strategy: expected a function from an op to the index of a ps task, got {ps_strategy!r}")
    if not merge_devices:
        logger.warning("merge_devices=False is deprecated: an op that names a part of a device gets no other part")
    return _DeviceSetter(
        ps=ps,
        worker=worker,
        merges=merge_devices,
        ps_ops=frozenset(PS_OPS if ps_ops is None else ps_ops),
        choose_ps=ps_strategy or _in_turns(count),
    )


@dataclass(frozen=True, kw_only=True)
class _DeviceSetter:
    """The function that `replica_device_setter` returns; its arguments, with devices as their parts."""

    ps: Mapping[str, str]
    worker: Mapping[str, str]
    merges: bool
    ps_ops: Collection[str]
    choose_ps: Callable[[Op], int]

    def __call__(self, op: Op) -> str:
        wanted = _parts(op.device)
        if wanted and not self.merges:
            return op.device
        if op.kind not in self.ps_ops:
            return _name({**self.worker, **wanted})
        is_of_ps = "job" in self.ps and wanted.get("job", self.ps["job"]) == self.ps["job"]
        task = {"task": str(self.choose_ps(op))} if is_of_ps else {}
        return _name({**self.ps, **task, **wanted})


def _in_turns(count: int) -> Callable[[Op], int]:
    turns = itertools.cycle(range(count))
    return lambda op: next(turns)


def _num_tasks(cluster: object, job: str) -> int:
    spec = ClusterSpec(cluster)  # type: ignore[arg-type]  # checked there
    return spec.num_tasks(job) if job in spec.jobs else 0


def _parts(device: str) -> dict[str, str]:
    """Return the parts that a name contains, such as ``{"job": "ps", "task": "1", "device": "CPU:0"}``."""
    parts: dict[str, str] = {}
    for text in filter(None, device.split("/")):
        if named := _NAMED_PART.fullmatch(text):
            parts[named["part"]] = named["value"]
        elif found := _DEVICE.fullmatch(text):
            kind = "CPU" if found["kind"].lower() == "cpu" else "GPU"
            parts["device"] = f"{kind}:{found['index'] or 0}"
        else:
            raise ConfigError(f"{device!r} names no device: {text!r}; expected one like '/job:ps/task:0/cpu:0'")
    return parts


def _name(parts: dict[str, str]) -> str:
    return "".join(f"/{part}:{parts[part]}" for part in _PARTS if part in parts)
