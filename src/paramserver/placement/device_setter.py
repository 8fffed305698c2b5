"""Which device a thing of a program goes to, by its kind: variables and tables to the ps tasks, all else to the worker.

Pure functions of names of devices, such as ``/job:ps/task:1/device:CPU:0``, in which any part may be missing.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from paramserver.cluster import ClusterSpec
from paramserver.errors import ConfigError
from paramserver.layout.variables import VariableSpec

logger = logging.getLogger(__name__)

PS_OPS = ("variable", "table")
"""The kinds of what lives on ps tasks."""

_PARTS = ("job", "replica", "task", "device")
_NAMED_PART = re.compile(r"(?P<part>job|replica|task):(?P<value>\w+)")
_DEVICE = re.compile(r"(?:device:)?(?P<kind>cpu|gpu|cuda)(?::(?P<index>\d+))?", re.IGNORECASE)


class Op(NamedTuple):
    """Something that has to go somewhere.

    Attributes:
        kind: What it is, such as ``variable``, ``table`` or ``matmul``.
        device: The device that the program has asked for; any part of its name may be missing.
        variable: What the variable is, for strategies that look at its name or size.
    """

    kind: str
    device: str = ""
    variable: VariableSpec | None = None


DeviceSetter = Callable[[Op], str]
"""The device of the next op. Called in creation order: it counts."""


def replica_device_setter(
    ps_tasks: int = 0,
    ps_device: str = "/job:ps",
    worker_device: str = "/job:worker",
    merge_devices: bool = True,
    cluster: object = None,
    ps_ops: Collection[str] | None = None,
    ps_strategy: Callable[[Op], int] | None = None,
) -> DeviceSetter | None:
    """A function from an op to its device; None where there are no ps tasks, so that nothing has to be placed.

    What the op's own device says is kept: an op of another job stays there, and takes no turn of a ps.

    Args:
        ps_tasks: How many ps tasks there are; ignored where there is a cluster.
        ps_device: Where variables go; its job is the one whose tasks take turns.
        worker_device: Where everything else goes.
        merge_devices: Whether to fill in what an op's device lacks; else an op that has any is left alone.
        cluster: A ClusterSpec or what one is made from, which says how many ps tasks there are.
        ps_ops: The kinds of ops that go to ps tasks; variables and tables by default.
        ps_strategy: Chooses the index of the ps task for an op; they take turns by default.

    Raises:
        TypeError: If ``ps_strategy`` cannot be called, or ``cluster`` is none.
        ConfigError: If a name is no device's; of an op's device, when the op is placed.

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
    turns = itertools.cycle(range(count))
    choose = ps_strategy or (lambda op: next(turns))
    kinds = frozenset(PS_OPS if ps_ops is None else ps_ops)

    def place(op: Op) -> str:
        wanted = _parts(op.device)
        if wanted and not merge_devices:
            return op.device
        if op.kind not in kinds:
            return _name({**worker, **wanted})
        is_of_ps = "job" in ps and wanted.get("job", ps["job"]) == ps["job"]
        task = {"task": str(choose(op))} if is_of_ps else {}
        return _name({**ps, **task, **wanted})

    return place


def _num_tasks(cluster: object, job: str) -> int:
    spec = ClusterSpec(cluster)  # type: ignore[arg-type]  # checked there
    return spec.num_tasks(job) if job in spec.jobs else 0


def _parts(device: str) -> dict[str, str]:
    """What a name says: ``{"job": "ps", "task": "1", "device": "CPU:0"}``, without what it does not say."""
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
