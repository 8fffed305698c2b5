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
from paramserver.cluster import Role, TaskId, TFConfigClusterResolver, environment, run_file
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


class Found(NamedTuple):
    """A run to ask: its ps tasks, and its token; None for the environment's."""

    targets: list[Target]
    token: str | None = None


def find_run(arguments: Sequence[str]) -> Found:
    """Return the run that arguments name: addresses of its ps tasks, or the id of a run launched on this machine.

    Without arguments it is the run of TF_CONFIG's cluster, or else the only launched run.

    Raises:
        ConfigError: If an address is malformed, there is no such run, or there are several.

    >>> find_run(["localhost:2222"])
    Found(targets=[Target(address='localhost:2222', task=None)], token=None)
    """
    if len(arguments) == 1 and arguments[0].isalnum():
        return _launched(arguments[0])
    if arguments:
        for address in arguments:
            parse_address(address, "status")
        return Found([Target(address) for address in dict.fromkeys(arguments)])
    cluster = TFConfigClusterResolver().cluster_spec()
    targets = [Target(cluster.address(task), str(task)) for task in cluster.tasks(Role.PS)]
    return Found(targets) if targets else _launched()


def _launched(run_id: str = "") -> Found:
    runs = run_file.running()
    fitting = [run for run in runs if run.run_id.startswith(run_id)]
    if len(fitting) == 1:
        (run,) = fitting
        targets = [Target(address, str(TaskId(Role.PS, index))) for index, address in enumerate(run.ps)]
        return Found(targets, run.token)
    known = ", ".join(f"{run.run_id} ({run.script})" for run in runs) or "none"
    wanted = f"the run {run_id!r}" if run_id else "one launched run, addresses of ps tasks, or ps tasks in TF_CONFIG"
    raise ConfigError(
        f"status: expected {wanted}; the launched runs of this user are: {known}. "
        "Name one such as 'paramserver status RUN', or an address such as localhost:2222"
    )


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
