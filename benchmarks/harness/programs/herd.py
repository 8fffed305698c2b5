"""``python -m benchmarks.harness.programs.herd HERD``: many light workers that compute nothing and take part as one.

A herd is a process that imports torch once and forks a process for each worker. A worker is a client of its own, with
connections of its own; its step is ``push_pull`` of a small arena on each ps: the end of `PreparedOptimizer.step`,
without a module, autograd and torch's threads. Orders go to all workers, and their reports are added up.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Sequence

import msgspec
import torch

from benchmarks.harness.arenas import sgd_arena
from benchmarks.harness.participant import Measured, Ready, take_part, tell
from paramserver.cluster import ClusterSpec, TaskId
from paramserver.distribute.connection import to_cluster
from paramserver.layout.arena import ArenaLayout
from paramserver.wire.messages import Part

CONNECT_LIMIT = 60.0
ARENA_BYTES = 4096
"""Bytes of the arena on each ps."""


class Herd(msgspec.Struct, kw_only=True, frozen=True):
    """The workers of a cluster that are a herd: ``count`` workers, from worker ``first`` on."""

    jobs: dict[str, list[str]]
    first: int
    count: int


def layouts(ps: int) -> list[list[ArenaLayout]]:
    """Return the layout of each ps: one arena."""
    return [[sgd_arena(f"v{index}", ARENA_BYTES)] for index in range(ps)]


def main(herd: Herd) -> None:
    """Take part until the input ends."""
    torch.set_num_threads(1)
    workers: list[socket.socket] = []
    for index in range(herd.first, herd.first + herd.count):
        ours, theirs = socket.socketpair()
        workers.append(ours)
        if not os.fork():
            for other in workers:
                other.close()
            _become_worker(herd, index, theirs)
        theirs.close()
    _lead(workers)
    for _ in workers:
        os.wait()


def _lead(workers: Sequence[socket.socket]) -> None:
    """Pass orders on to the workers and their reports back, until there are no more orders."""
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(worker.makefile("rb")) for worker in workers]
        ready = [msgspec.json.decode(line.readline(), type=Ready) for line in lines]
        tell(Ready(step_seconds=max(each.step_seconds for each in ready)))
        for order in sys.stdin.buffer:
            for worker in workers:
                worker.sendall(order)
            tell(together([msgspec.json.decode(line.readline(), type=Measured) for line in lines]))
        for worker in workers:
            worker.close()


def together(parts: Sequence[Measured]) -> Measured:
    """Return the reports of a window as one, whose steps per second are the sum of theirs."""
    steps = sum(part.steps for part in parts)
    return Measured(
        steps=steps,
        seconds=steps / sum(part.steps / part.seconds for part in parts),
        staleness=sum(part.staleness for part in parts),
        largest_staleness=max(part.largest_staleness for part in parts),
        loss=0.0,
    )


def _become_worker(herd: Herd, index: int, orders: socket.socket) -> None:
    """Work in a process that was just forked, with ``orders`` as its input and output; never return."""
    try:
        os.dup2(orders.fileno(), sys.stdin.fileno())
        os.dup2(orders.fileno(), sys.stdout.fileno())
        orders.close()
        _work(herd, index)
    except BaseException:  # noqa: BLE001  # it must not unwind into frames of the forking process
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _work(herd: Herd, index: int) -> None:
    cluster = ClusterSpec(herd.jobs)
    arenas = layouts(cluster.num_tasks("ps"))
    client = to_cluster(cluster, TaskId.parse(f"worker:{index}"), CONNECT_LIMIT)
    client.await_ready(CONNECT_LIMIT)
    client.join(arenas)
    client.open()
    parts, pull = [[Part(0, "rule")] for _ in arenas], [[0] for _ in arenas]
    client.pull(pull)
    plans = client.plan(parts, pull)
    take_part(lambda: client.push_pull(plans, counts=True).staleness)
    client.goodbye()


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Herd))
