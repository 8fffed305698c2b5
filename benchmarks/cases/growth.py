"""The cost of more variables and of more workers.

    * Variables: the null step (see `benchmarks.cases.null`) of one worker by shared memory, the same bytes in 1 to
      2,000 variables; beside it the same step with one variable.
    * Workers: 1 to 64 workers that only push and pull 4 KiB on each ps (see `benchmarks.harness.programs.herd`), on 1,
      2 and 4 ps tasks; beside them 2 such workers. An update is a push to every ps. The CPU time is that of all ps
      tasks.
    * The memory of a connection to a ps; beside it that of a connection to a bare server with a thread for each.

Everything runs on one machine: with more workers than cores the competition for cores grows, too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.harness import memory
from benchmarks.harness.arenas import create_arenas
from benchmarks.harness.case import Case
from benchmarks.harness.cluster import Cluster, start_cluster, start_trainer
from benchmarks.harness.crew import Child, Crew, crew
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Subject, take_turns
from benchmarks.harness.options import Effort
from benchmarks.harness.programs.bare import BareServer
from benchmarks.harness.programs.herd import Herd, layouts
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.window import seconds_per_step, slowest_step, steps_per_second
from benchmarks.models.null import Parameters
from paramserver.client.client import ParameterClient

VARIABLES = (100, 500, 2000)
SHARED_BYTES = 16_000_000
MOST_FOR_VARIABLES = 1.2

PS = (1, 2, 4)
WORKERS = (1, 16, 64)
FEW_WORKERS = (64,)
BESIDE = 2
LEAST_OF_WORKERS = 0.8


def measure(options: Effort) -> Iterator[Figure]:
    """Measure variables, then workers on each number of ps tasks. Blocks for about two minutes."""
    yield from _variables(options)
    for ps in options.pick(PS, PS[:1]):
        with crew() as its_crew:
            yield from _workers(its_crew, ps, options)


def _variables(options: Effort) -> Iterator[Figure]:
    counts = options.pick(VARIABLES, VARIABLES[-1:])
    with crew() as its_crew:
        workers = {
            count: start_trainer(
                its_crew,
                f"the worker with {count} variables",
                Job(model=Parameters(variables=count, nbytes=SHARED_BYTES)),
                start_cluster(its_crew).env("chief:0", "auto"),
            )
            for count in (1, *counts)
        }
        step_seconds = slowest_step(list(workers.values()))
        seconds = {
            count: partial(seconds_per_step, [worker], options.seconds, step_seconds)
            for count, worker in workers.items()
        }
        for count in counts:
            yield Subject(
                case="null step of 16 MB",
                size=count,
                size_unit="variables",
                beside="1 variable",
                unit="s",
                better="less",
                target=MOST_FOR_VARIABLES if count == VARIABLES[-1] else None,
            ).measure(seconds[count], seconds[1], options.repeats)


def _workers(its_crew: Crew, ps: int, options: Effort) -> Iterator[Figure]:
    counts = options.pick(WORKERS, FEW_WORKERS)
    totals = sorted({*counts, BESIDE})
    cluster = start_cluster(its_crew, ps=ps, workers=totals[-1])
    with cluster.client("chief:0", "auto") as chief:
        create_arenas(chief, layouts(ps))
        herds = Herds(cluster, chief, options.seconds)
        held = [herds.grow(its_crew, total) for total in totals]
        if ps == 1:
            more = totals[-1] - totals[0]
            yield Subject(
                case="memory of a connection to a ps",
                size=totals[-1],
                size_unit="workers",
                beside="a bare server",
                unit="B",
                better="less",
            ).figure([((held[-1] - held[0]) / more, _bare_connection(its_crew, more))])
        for count in counts:
            yield from _beside_few(herds, count, ps, options.repeats)


def _beside_few(herds: Herds, count: int, ps: int, repeats: int) -> Iterator[Figure]:
    of_workers = partial(Subject, size=count, size_unit="workers", beside=f"{BESIDE} workers")
    target = LEAST_OF_WORKERS if (count, ps) == (WORKERS[-1], 1) else None
    cpu: dict[int, list[float]] = {count: [], BESIDE: []}

    def rate(workers: int) -> float:
        updates_per_second, cpu_seconds = herds.run(workers)
        cpu[workers].append(cpu_seconds)
        return updates_per_second

    pairs = take_turns(partial(rate, count), partial(rate, BESIDE), repeats)
    yield of_workers(case=f"updates/s, {ps} ps", unit="updates/s", target=target).figure(pairs)
    if all(map(all, cpu.values())):  # a clock of 10 ms may see nothing of a short turn
        pairs = list(zip(cpu[count], cpu[BESIDE], strict=True))
        yield of_workers(case=f"CPU time of an update, {ps} ps", unit="s", better="less").figure(pairs)


class Herds:
    """Ever more workers on some ps tasks.

    Args:
        cluster: The ps tasks.
        chief: Their chief.
        seconds: Length of a turn.
    """

    def __init__(self, cluster: Cluster, chief: ParameterClient, seconds: float) -> None:
        self._cluster = cluster
        self._chief = chief
        self._seconds = seconds
        self._herds: dict[int, Child] = {}
        self._step_seconds = 0.0

    def grow(self, its_crew: Crew, total: int) -> int:
        """Add workers until there are ``total``, and return the bytes that ps:0 then holds."""
        first = max(self._herds, default=0)
        jobs = {role: list(addresses) for role, addresses in self._cluster.jobs.items()}
        spec = msgspec.json.encode(Herd(jobs=jobs, first=first, count=total - first)).decode()
        herd = its_crew.start_module(
            f"a herd of {total - first}",
            "benchmarks.harness.programs.herd",
            spec,
            self._cluster.env(f"worker:{first}", "auto"),
        )
        self._step_seconds = max(self._step_seconds, slowest_step([herd]))
        self._herds[total] = herd
        return _memory(self._cluster.servers[0])

    def run(self, workers: int) -> tuple[float, float]:
        """Have the first ``workers`` workers take a turn.

        Returns:
            Updates per second, and the seconds of CPU time of all ps tasks for an update.
        """
        children = [herd for total, herd in self._herds.items() if total <= workers]
        cpu, updates = _cpu_seconds(self._cluster.servers), self._chief.read_global_step()
        measured = steps_per_second(children, self._seconds, self._step_seconds)
        cpu = _cpu_seconds(self._cluster.servers) - cpu
        return measured, cpu / (self._chief.read_global_step() - updates)


def _bare_connection(its_crew: Crew, count: int) -> float:
    """Return the bytes that each of ``count`` connections costs a bare server."""
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
    """Return the CPU time of processes, in user and kernel mode: fields 14 and 15 of proc_pid_stat(5)."""
    texts = [Path(f"/proc/{child.pid}/stat").read_text() for child in children]
    ticks = [sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in texts]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


CASE = Case(title="More variables and more workers", options=Effort, measure=measure, order=40)
