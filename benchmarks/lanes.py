"""``python -m benchmarks.lanes``: what goes through a lane, beside the least that moves the same bytes.

A client in this process and a ps in its own; one thread each. Beside them:

    * a round trip of a small message, through client, server and store: a bare echo over the same kind of socket, also
      between two processes;
    * shared memory: a memcpy of as many bytes, in this process;
    * TCP: a bare server that sends the bytes to a ``recv_into`` loop, or receives them in one.

A pull ends with the values in the caller's memory; a push with the ps having applied SGD to its own, which neither the
memcpy nor the bare server does.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.bare import Bare, BareServer
from benchmarks.figure import Effort, Figure, compared, run, seconds_each, take_turns
from benchmarks.processes import crew
from benchmarks.serving import start_servers
from benchmarks.shapes import LEARNING_RATE
from paramserver.client.client import ParameterClient
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import describe
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import payload_memory
from paramserver.wire.messages import Part

SIZES = (4_000, 64_000, 1_000_000, 16_000_000, 128_000_000, 512_000_000)
JUDGED = 128_000_000
"""Of how many bytes a ratio was promised: more than any cache holds."""
FEW = (4_000, JUDGED)

MOST_ROUND_TRIPS = 2.0

Sides = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Kind:
    """A lane, and what it is measured beside.

    Attributes:
        name: For people.
        lane: As the client is told.
        family: Of the socket that carries its messages.
        beside: What moves the same bytes.
        pull: What was promised of a pull, as a share of that.
        push: What was promised of a push that is applied.
    """

    name: str
    lane: str
    family: socket.AddressFamily
    beside: str
    pull: float
    push: float


KINDS = (
    Kind("shared memory", "auto", socket.AF_UNIX, "memcpy", 0.85, 0.45),
    Kind("TCP", "tcp", socket.AF_INET, "recv_into", 0.9, 0.9),
)


def measure(effort: Effort) -> Iterator[Figure]:
    """All sizes on both lanes. Blocks for up to two minutes; takes three times the largest size of memory."""
    for kind in KINDS:
        yield from _measure(kind, effort)


def _measure(kind: Kind, effort: Effort) -> Iterator[Figure]:
    sizes = effort.pick(SIZES, FEW)
    with crew() as its_crew:
        servers = start_servers(its_crew)
        bare_server = BareServer(its_crew, kind.family, sizes[-1] if kind.lane == "tcp" else 0)
        with contextlib.closing(servers.client("chief:0", kind.lane)) as client, bare_server.client() as bare:
            _fill(client, sizes)
            yield _round_trip(kind, client, bare, effort)
            for arena, nbytes in enumerate(sizes):
                pull, push = _beside(kind, bare, nbytes)
                sides: Sides = (partial(client.pull, [[arena]]), pull)
                yield _bytes_moved(kind, f"{kind.name}, pull", nbytes, sides, kind.pull, effort)
                sides = (partial(client.push_pull, client.plan([[Part(arena, "rule")]], [()]), counts=True), push)
                yield _bytes_moved(kind, f"{kind.name}, push and apply", nbytes, sides, kind.push, effort)


def _fill(client: ParameterClient, sizes: tuple[int, ...]) -> None:
    """An arena of each size on the ps, with random values."""
    rule = describe(torch.optim.SGD([torch.zeros(1)], lr=LEARNING_RATE), 0)
    specs = [VariableSpec(f"of {nbytes} bytes", (nbytes // 4,), "float32") for nbytes in sizes]
    client.create([[ArenaLayout("float32", rule, (spec,)) for spec in specs]])
    (memory,) = client.open()
    for gradients in memory.gradients:
        gradients.uniform_()
    everything = range(len(sizes))
    client.push_pull(client.plan([[Part(arena, "assign") for arena in everything]], [everything]), counts=False)
    client.mark_ready(0)


def _beside(kind: Kind, bare: Bare, nbytes: int) -> Sides:
    """The least that a pull, and a push, of so many bytes takes."""
    target, source = (payload_memory(nbytes).fill_(1).numpy() for _ in range(2))
    if kind.lane == "tcp":
        return partial(bare.pull, target.data), partial(bare.push, source.data)
    copy = partial(np.copyto, target, source)
    return copy, copy


def _round_trip(kind: Kind, client: ParameterClient, bare: Bare, effort: Effort) -> Figure:
    ours, other = (partial(seconds_each, side, effort.seconds) for side in (client.read_global_step, bare.echo))
    return compared(
        take_turns(ours, other, effort.repeats),
        "lanes",
        f"{kind.name}, round trip of a small message",
        size=1,
        size_unit="message",
        beside="bare echo",
        unit="s",
        better="less",
        target=MOST_ROUND_TRIPS,
    )


def _bytes_moved(kind: Kind, case: str, nbytes: int, sides: Sides, target: float, effort: Effort) -> Figure:
    def rate(side: Callable[[], object]) -> float:
        return nbytes / seconds_each(side, effort.seconds / 2)

    for side in sides:
        side()  # so that all memory is there
    ours, other = (partial(rate, side) for side in sides)
    return compared(
        take_turns(ours, other, effort.repeats),
        "lanes",
        case,
        size=nbytes,
        size_unit="B",
        beside=kind.beside,
        unit="B/s",
        better="more",
        target=target if nbytes == JUDGED else None,
    )


if __name__ == "__main__":
    run(measure, "What goes through a lane, beside the least that moves the same bytes.")
