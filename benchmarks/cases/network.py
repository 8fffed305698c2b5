"""Steps between hosts, which are made of network namespaces on this machine: it takes root.

    * A step over a link of some rate, beside a bare ``sendall`` and then ``recv_into`` of the same bytes.
    * Two workers on one ps, together beside one alone: where the link of the ps is the limit, and where it is not.
    * Two ps tasks on two hosts beside one.
    * A step between two hosts without a limit, beside one over loopback; and the same with bare sockets, because the
      virtual network of the hosts costs more than loopback does.

Models compute nothing; hosts share the cores of this machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from msgspec import structs
from tests.multihost.cluster import Cluster
from tests.multihost.hosts import Host, Network, why_impossible
from tests.multiprocess.warm import Task, Warm

from benchmarks.harness.case import Case
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.options import Options
from benchmarks.harness.programs import stepper
from benchmarks.harness.programs.stepper import LISTENS, RATE, READY
from benchmarks.models.shapes import MLPS
from paramserver.launch.fork_server import OwnForkServer
from paramserver.launch.spec import PRELOADED, LaunchOptions, runtime_variables

PROGRAM = Path(stepper.__file__)
STEPPER = "benchmarks.harness.programs.stepper"
PORT, OTHER_PORT = "2300", "2301"

LINKS = (("1gbit", 100_000_000), ("100mbit", 25_000_000))
NBYTES = 100_000_000

FULL_DUPLEX, SCALING, UNLIMITED = 1.7, 1.8, 0.9
"""Promised ratios."""


class NetworkOptions(Options, kw_only=True, frozen=True):
    """The options; see `Options`."""

    seconds: float = 6.0
    repeats: int = 3


def measure(options: NetworkOptions) -> Iterator[Figure]:
    """Measure all. Blocks for about five minutes."""
    if why := why_impossible():
        sys.stderr.write(f"steps between hosts are not measured: {why}\n")
        return
    with _warm() as warm:
        for rate, nbytes in LINKS:
            with Network(warm) as network:
                yield _over_a_link(network, options, rate, nbytes)
        for ps_rate, target in (("1gbit", None), ("10gbit", SCALING)):
            with Network(warm) as network:
                yield _two_workers(network, options, ps_rate, target)
        with Network(warm) as network:
            yield _two_ps(network, options)
        for name in ("small", "large"):
            with Network(warm) as network:
                yield from _without_limit(network, options, name, MLPS[name].nbytes)


@contextmanager
def _warm() -> Iterator[Warm]:
    """Return what starts processes, which find torch imported."""
    env = runtime_variables(LaunchOptions(script="any", threads=1), cores=1)
    server = OwnForkServer(sys.executable, env, PRELOADED)
    server.make_ready()
    with closing(server), closing(Warm(server)) as warm:
        yield warm


def _over_a_link(network: Network, options: NetworkOptions, rate: str, nbytes: int) -> Figure:
    one, two = _hosts(network, one="", two=rate)
    bare = _bare(one, two, nbytes)
    (chief,) = _start({"chief:0": one, "ps:0": two}, nbytes)
    return Subject(
        case=f"a step at {rate}",
        size=nbytes,
        size_unit="B",
        beside="sendall, then recv_into",
        target=FULL_DUPLEX,
    ).measure(partial(_rate, [chief], options), partial(_rate, [bare], options), options.repeats)


def _two_workers(network: Network, options: NetworkOptions, ps_rate: str, target: float | None) -> Figure:
    one, two, three = _hosts(network, one="1gbit", two="1gbit", three=ps_rate)
    workers = _start({"chief:0": one, "worker:0": two, "ps:0": three}, NBYTES)
    return Subject(
        case=f"two workers at 1gbit, the ps at {ps_rate}",
        size=NBYTES,
        size_unit="B",
        beside="one of them alone",
        target=target,
    ).measure(partial(_rate, workers, options), partial(_rate, workers[:1], options), options.repeats)


def _two_ps(network: Network, options: NetworkOptions) -> Figure:
    worker, *ps = _hosts(network, worker="2gbit", one="1gbit", two="1gbit", three="1gbit")
    (with_one,) = _start({"chief:0": worker, "ps:0": ps[0]}, NBYTES)
    (with_two,) = _start({"chief:0": worker, "ps:0": ps[1], "ps:1": ps[2]}, NBYTES)
    return Subject(
        case="two ps tasks at 1gbit, the worker at 2gbit",
        size=NBYTES,
        size_unit="B",
        beside="one ps",
        target=SCALING,
    ).measure(partial(_rate, [with_two], options), partial(_rate, [with_one], options), options.repeats)


def _without_limit(network: Network, options: NetworkOptions, name: str, nbytes: int) -> Iterator[Figure]:
    one, two = _hosts(network, one="", two="")
    subject = Subject(
        case=f"bare sockets between hosts without a limit, as many bytes as {name}",
        size=nbytes,
        size_unit="B",
        beside="inside a host",
    )
    over, inside = _bare(one, two, nbytes), _bare(one, one, nbytes, OTHER_PORT)
    yield subject.measure(partial(_rate, [over], options), partial(_rate, [inside], options), options.repeats)
    (between,) = _start({"chief:0": one, "ps:0": two}, nbytes)
    (local,) = _start({"chief:0": one, "ps:0": one}, nbytes, PARAMSERVER_LANE="tcp")
    yield structs.replace(
        subject, case=f"a step between hosts without a limit, as many bytes as {name}", target=UNLIMITED
    ).measure(partial(_rate, [between], options), partial(_rate, [local], options), options.repeats)


def _bare(asking: Host, serving: Host, nbytes: int, port: str = PORT) -> Task:
    """Start both ends of a bare connection, and return the one that makes steps."""
    serving.start(STEPPER, "serve", str(nbytes), port, env={}).await_word(LISTENS)
    bare = asking.start(STEPPER, "ask", str(nbytes), serving.name, port, env={})
    bare.await_word(READY)
    return bare


def _hosts(network: Network, **rates: str) -> list[Host]:
    """Add hosts by name, each with the rate of its link, if it has a limit."""
    hosts = network.add(*rates)
    network.spread_own_names("ipv4")
    for host in hosts:
        if rates[host.name]:
            host.limit(rates[host.name])
    return hosts


def _start(hosts: Mapping[str, Host], nbytes: int, **env: str) -> list[Task]:
    """Start a cluster, and return the tasks that train, as soon as they have made a step."""
    cluster = Cluster(hosts, PROGRAM.read_text(), args=("train", str(nbytes)))
    tasks = {task: cluster.start(task, **env) for task in hosts}
    training = [tasks[task] for task in hosts if not task.startswith("ps")]
    for task in training:
        task.await_word(READY)
    return training


def _rate(tasks: Sequence[Task], options: NetworkOptions) -> float:
    """Return the steps in a second of tasks that work at the same time, together."""
    for task in tasks:
        task.tell(str(options.seconds))
    for task in tasks:
        task.await_word(RATE)
    return sum(float(task.said.split()[-1]) for task in tasks)


CASE = Case(
    title="Between hosts",
    options=NetworkOptions,
    measure=measure,
    is_in_suite=False,
)
