"""The state of a run: the contents and counters of its ps tasks, asked from outside.

The asking process is an observer: it holds the run's token and takes no part. No ps waits for it, counts it as a worker
or lets it change anything.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from rich.filesize import decimal
from rich.table import Table

from paramserver.client.client import ParameterClient
from paramserver.cluster import Role, TFConfigClusterResolver, environment
from paramserver.cluster.addresses import parse_address
from paramserver.errors import ConfigError
from paramserver.transport.handshake import connect
from paramserver.transport.identity import OBSERVER, Identity, new_incarnation
from paramserver.transport.lane import Lane
from paramserver.wire.messages import Status


class Target(NamedTuple):
    """A ps to ask: its address ``host:port``, and the expected task, None for any."""

    address: str
    task: str | None = None


def find_targets(addresses: Sequence[str]) -> list[Target]:
    """Return the ps tasks at some addresses; without addresses, those of TF_CONFIG's cluster.

    Raises:
        ConfigError: If an address is malformed, or there are neither addresses nor a cluster with ps tasks.

    >>> find_targets(["localhost:2222"])
    [Target(address='localhost:2222', task=None)]
    """
    if addresses:
        for address in addresses:
            parse_address(address, "status")
        return [Target(address) for address in dict.fromkeys(addresses)]
    cluster = TFConfigClusterResolver().cluster_spec()
    targets = [Target(cluster.address(task), str(task)) for task in cluster.tasks(Role.PS)]
    if not targets:
        raise ConfigError(
            "status: expected the addresses of ps tasks, or a cluster with ps tasks in TF_CONFIG, got neither; "
            "give one such as 'paramserver status localhost:2222'"
        )
    return targets


def ask(targets: Sequence[Target], timeout: float, token: str | None = None) -> list[Status]:
    """Return the contents and counters of each ps, sorted by task. Blocks for about ``timeout`` seconds at most.

    Args:
        targets: The ps tasks.
        timeout: Seconds to try to reach all of them.
        token: The secret of the run; by default the environment's.

    Raises:
        DeadlineError: If a ps cannot be reached in time.
        TokenError: If this process does not hold the token of the run.
        RefusedError: If another ps is at an address.
        RemoteProtocolError: If something other than a ps is at an address.
        UnavailableError: If a ps goes away before it has answered.
    """
    me = Identity(
        task=OBSERVER,
        token=environment.read().token if token is None else token,
        incarnation=new_incarnation(),
    )
    give_up = time.monotonic() + timeout
    lanes: list[Lane] = []
    with contextlib.ExitStack() as stack:
        for address, task in targets:
            remaining = max(round(give_up - time.monotonic(), 1), 0.0)  # rounded for error messages
            lanes.append(connect(address, task, me, lane="tcp", timeout=remaining))
            stack.callback(lanes[-1].close)
        return sorted(ParameterClient(lanes).status(), key=_order)


def loads(statuses: Sequence[Status]) -> list[float]:
    """Return the size of the values on each ps relative to the mean: 1.0 if all hold the same."""
    total = sum(status.values_bytes for status in statuses)
    return [status.values_bytes * len(statuses) / total if total else 1.0 for status in statuses]


def as_json(statuses: Sequence[Status]) -> str:
    """Return everything as JSON: the global step, and each task's status with its load, as in `loads`."""
    tasks = [
        {**msgspec.structs.asdict(status), "load": round(load, 4)}
        for status, load in zip(statuses, loads(statuses), strict=True)
    ]
    return json.dumps({"global_step": statuses[0].global_step, "tasks": tasks}, indent=2)


def as_table(statuses: Sequence[Status]) -> Table:
    """Return a table with a line for each ps, in 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("task")
    for header in ("variables", "values", "slots", "load", "updates", "staleness", "workers"):
        table.add_column(header, justify="right", overflow="fold")
    for status, load in zip(statuses, loads(statuses), strict=True):
        table.add_row(
            status.task,
            str(status.num_variables),
            decimal(status.values_bytes),
            decimal(status.slots_bytes),
            f"{load:.2f}x",
            f"{status.updates:,}",
            f"{status.mean_staleness:.1f} max {status.largest_staleness}",
            str(len(status.joined)),
        )
    return table


def _order(status: Status) -> tuple[str, int]:
    job, _, index = status.task.partition(":")
    return job, int(index) if index.isdecimal() else 0
