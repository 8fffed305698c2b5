"""``python -m benchmarks.growth``: what more variables and more workers cost.

    * Variables: the null step (see `benchmarks.null`) of one worker by shared memory, the same bytes in 1 to 2,000
      variables; beside it the same step with one variable.
    * Workers: 1 to 64 that do nothing but push and pull 4 KiB on each ps (see `benchmarks.herd`), on 1, 2 and 4 ps
      tasks; beside them 2 such workers. An update is a push to every ps. The CPU time is that of all ps tasks.
    * Memory that a connection costs a ps; beside it what one costs a bare server with a thread for each.

Everything is on one machine: with more workers than cores what grows is the competition for them, too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from benchmarks import memory
from benchmarks.bare import BareServer
from benchmarks.figure import Effort, Figure, Pair, compared, run, take_turns
from benchmarks.herd import Herd, layouts
from benchmarks.processes import BenchmarkError, Child, Crew, crew
from benchmarks.serving import Servers, start_servers
from benchmarks.stepper import Spec, slowest_step, start, steps_per_second
from paramserver.client.client import ParameterClient
from paramserver.wire.messages import Part

VARIABLES = (100, 500, 2000)
SHARED_BYTES = 16_000_000
MOST_FOR_VARIABLES = 1.2

PS = (1, 2, 4)
WORKERS = (1, 16, 64)
FEW_WORKERS = (64,)
BESIDE = 2
LEAST_OF_WORKERS = 0.8


def measure(effort: Effort) -> Iterator[Figure]:
    """Variables, then workers on each number of ps tasks. Blocks for about two minutes."""
    yield from _variables(effort)
    for ps in effort.pick(PS, PS[:1]):
        with crew() as its_crew:
            yield from Workers(its_crew, ps, effort).measure()


def _variables(effort: Effort) -> Iterator[Figure]:
    with crew() as its_crew:
        workers = {
            count: start(
                its_crew,
                f"the worker with {count} variables",
                Spec(variables=count, nbytes=SHARED_BYTES),
                start_servers(its_crew).env("chief:0", "auto"),
            )
            for count in (1, *effort.pick(VARIABLES, VARIABLES[-1:]))
        }
        step_seconds = slowest_step(list(workers.values()))

        def seconds(count: int) -> float:
            return 1 / steps_per_second([workers[count]], effort.seconds, step_seconds)

        for count in list(workers)[1:]:
            yield compared(
                take_turns(partial(seconds, count), partial(seconds, 1), effort.repeats),
                "growth",
                "null step of 16 MB",
                size=count,
                size_unit="variables",
                beside="1 variable",
                unit="s",
                better="less",
                target=MOST_FOR_VARIABLES if count == VARIABLES[-1] else None,
            )


class Workers:
    """Ever more workers on some ps tasks.

    Args:
        its_crew: Whose processes they become.
        ps: How many ps tasks.
        effort: How much is measured.
    """

    def __init__(self, its_crew: Crew, ps: int, effort: Effort) -> None:
        self._crew = its_crew
        self._ps = ps
        self._effort = effort
        self._counts = effort.pick(WORKERS, FEW_WORKERS)
        self._herds: dict[int, Child] = {}
        self._step_seconds = 0.0

    def measure(self) -> Iterator[Figure]:
        """The figures of all numbers of workers."""
        totals = sorted({*self._counts, BESIDE})
        servers = start_servers(self._crew, ps=self._ps, workers=totals[-1])
        with contextlib.closing(servers.client("chief:0", "auto")) as chief:
            _initialize(chief, self._ps)
            held = self._start(servers, totals)
            if self._ps == 1:
                yield self._connection_memory(totals, held)
            for count in self._counts:
                yield from self._beside_few(servers, chief, count)

    def _start(self, servers: Servers, totals: Sequence[int]) -> list[int]:
        """Start a herd for each step from one number of workers to the next; the memory of ps:0 after each."""
        held, first = [], 0
        for total in totals:
            jobs = {role: list(addresses) for role, addresses in servers.jobs.items()}
            spec = msgspec.json.encode(Herd(jobs=jobs, first=first, count=total - first)).decode()
            env = servers.env(f"worker:{first}", "auto")
            herd = self._crew.start_module(f"a herd of {total - first}", "benchmarks.herd", spec, env)
            self._step_seconds = max(self._step_seconds, slowest_step([herd]))
            self._herds[total] = herd
            held.append(_memory(servers.children[0]))
            first = total
        return held

    def _connection_memory(self, totals: Sequence[int], held: Sequence[int]) -> Figure:
        more = totals[-1] - totals[0]
        return compared(
            [((held[-1] - held[0]) / more, _bare_connection(self._crew, more))],
            "growth",
            "memory of a connection to a ps",
            size=totals[-1],
            size_unit="workers",
            beside="a bare server",
            unit="B",
            better="less",
        )

    def _beside_few(self, servers: Servers, chief: ParameterClient, count: int) -> Iterator[Figure]:
        cpu: dict[int, list[float]] = {count: [], BESIDE: []}

        def rate(workers: int) -> float:
            children = [herd for total, herd in self._herds.items() if total <= workers]
            used, updates = _cpu_seconds(servers.children), chief.read_global_step()
            measured = steps_per_second(children, self._effort.seconds, self._step_seconds)
            used, updates = _cpu_seconds(servers.children) - used, chief.read_global_step() - updates
            cpu[workers].append(used / updates)
            return measured

        rates = take_turns(partial(rate, count), partial(rate, BESIDE), self._effort.repeats)
        target = LEAST_OF_WORKERS if (count, self._ps) == (WORKERS[-1], 1) else None
        yield self._of_workers("updates/s", count, "updates/s", "more", rates, target)
        if all(map(all, cpu.values())):  # a clock of 10 ms may see nothing of a short turn
            pairs = list(zip(cpu[count], cpu[BESIDE], strict=True))
            yield self._of_workers("CPU time of an update", count, "s", "less", pairs)

    def _of_workers(
        self, what: str, count: int, unit: str, better: str, pairs: list[Pair], target: float | None = None
    ) -> Figure:
        return compared(
            pairs,
            "growth",
            f"{what}, {self._ps} ps",
            size=count,
            size_unit="workers",
            beside=f"{BESIDE} workers",
            unit=unit,
            better="more" if better == "more" else "less",
            target=target,
        )


def _initialize(chief: ParameterClient, ps: int) -> None:
    chief.create(layouts(ps))
    chief.open()
    chief.push_pull(chief.plan([[Part(0, "assign")] for _ in range(ps)], [[0] for _ in range(ps)]), counts=False)
    chief.mark_ready(0)


def _bare_connection(its_crew: Crew, count: int) -> float:
    """Bytes that each of ``count`` connections costs a bare server."""
    server = BareServer(its_crew, socket.AF_UNIX)
    with contextlib.ExitStack() as stack:
        for _ in range(BESIDE):
            stack.enter_context(server.client()).echo()
        before = _memory(server.child)
        for _ in range(count):
            stack.enter_context(server.client()).echo()
        return (_memory(server.child) - before) / count


def _memory(child: Child) -> int:
    held = memory.read(child.pid)
    if held is None:
        raise BenchmarkError(f"{child.name}: there is no /proc/{child.pid} to read its memory from; expected Linux")
    return held.now


def _cpu_seconds(children: Sequence[Child]) -> float:
    """Seconds that processes have computed, in user and kernel mode: fields 14 and 15 of proc_pid_stat(5)."""
    texts = [Path(f"/proc/{child.pid}/stat").read_text() for child in children]
    ticks = [sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in texts]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run(measure, "What more variables and more workers cost.")
