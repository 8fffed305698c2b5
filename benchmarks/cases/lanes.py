"""Messages and bytes that go through a lane, beside the least that moves the same bytes.

A client in this process and a ps in its own; one thread each. Beside them:

    * a round trip of a small message, through client, server and store: a bare echo over the same kind of socket, also
      between two processes;
    * shared memory: a memcpy of as many bytes, in this process;
    * TCP: a bare server that sends the bytes to a ``recv_into`` loop, or receives them in one.

A pull ends with the values in the caller's memory; a push ends when the ps has applied SGD to its own values, which
neither the memcpy nor the bare server does.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.harness.arenas import create_arenas, sgd_arena
from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_cluster
from benchmarks.harness.crew import crew
from benchmarks.harness.figure import Figure, Subject, seconds_each
from benchmarks.harness.options import LANE_NAMES, Effort
from benchmarks.harness.programs.bare import Bare, BareServer
from paramserver.memory.arena_memory import payload_memory
from paramserver.wire.messages import Part

SIZES = (4_000, 64_000, 1_000_000, 16_000_000, 128_000_000, 512_000_000)
JUDGED = 128_000_000
"""The size for which a ratio was promised: larger than any cache."""
FEW = (4_000, JUDGED)

MOST_ROUND_TRIPS = 2.0

Action = Callable[[], object]
"""Moves bytes once. Blocks."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A lane, and what it is measured beside.

    Attributes:
        lane: The option of a client.
        family: The family of the socket that carries messages.
        beside: What moves the same bytes.
        pull: Promised ratio of a pull.
        push: Promised ratio of a push that is applied.
    """

    lane: str
    family: socket.AddressFamily
    beside: str
    pull: float
    push: float

    @property
    def name(self) -> str:
        """Its name in results."""
        return LANE_NAMES[self.lane]


KINDS = (
    Kind(lane="auto", family=socket.AF_UNIX, beside="memcpy", pull=0.85, push=0.45),
    Kind(lane="tcp", family=socket.AF_INET, beside="recv_into", pull=0.9, push=0.9),
)


def measure(options: Effort) -> Iterator[Figure]:
    """Measure all sizes on both lanes. Blocks for up to two minutes; takes three times the largest size of memory."""
    for kind in KINDS:
        yield from _measure(kind, options)


def _measure(kind: Kind, options: Effort) -> Iterator[Figure]:
    sizes = options.pick(SIZES, FEW)
    with crew() as its_crew:
        cluster = start_cluster(its_crew)
        bare_server = BareServer(its_crew, kind.family, sizes[-1] if kind.lane == "tcp" else 0)
        with cluster.client("chief:0", kind.lane) as client, bare_server.client() as bare:
            create_arenas(client, [[sgd_arena(f"of {nbytes} bytes", nbytes) for nbytes in sizes]])
            ours = partial(seconds_each, client.read_global_step, options.seconds)
            yield _round_trip(kind).measure(ours, partial(seconds_each, bare.echo, options.seconds), options.repeats)
            for arena, nbytes in enumerate(sizes):
                move = partial(_bytes_moved, kind, nbytes, options)
                pull, push = _beside(kind, bare, nbytes)
                yield move("pull", partial(client.pull, [[arena]]), pull, kind.pull)
                plans = client.plan([[Part(arena, "rule")]], [()])
                yield move("push and apply", partial(client.push_pull, plans, counts=True), push, kind.push)


def _beside(kind: Kind, bare: Bare, nbytes: int) -> tuple[Action, Action]:
    """Return the least that a pull, and a push, of so many bytes takes."""
    target, source = (payload_memory(nbytes).fill_(1).numpy() for _ in range(2))
    if kind.lane == "tcp":
        return partial(bare.pull, target.data), partial(bare.push, source.data)
    copy = partial(np.copyto, target, source)
    return copy, copy


def _round_trip(kind: Kind) -> Subject:
    return Subject(
        case=f"{kind.name}, round trip of a small message",
        size_unit="message",
        beside="bare echo",
        unit="s",
        better="less",
        target=MOST_ROUND_TRIPS,
    )


def _bytes_moved(
    kind: Kind, nbytes: int, options: Effort, what: str, ours: Action, other: Action, target: float
) -> Figure:
    def rate(move: Action) -> float:
        return nbytes / seconds_each(move, options.seconds / 2)

    ours(), other()  # so that all memory is there
    return Subject(
        case=f"{kind.name}, {what}",
        size=nbytes,
        size_unit="B",
        beside=kind.beside,
        unit="B/s",
        target=target if nbytes == JUDGED else None,
    ).measure(partial(rate, ours), partial(rate, other), options.repeats)


CASE = Case(title="What goes through a lane", options=Effort, measure=measure, order=20)
