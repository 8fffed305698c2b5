"""Whole runs on several hosts, each task started by the same ``paramserver task``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.integration.transport.ipv6 import needs_ipv6
from tests.multihost.cluster import ESTIMATOR, OWN_LOOP, Cluster, by_ipv4, by_ipv6, by_name
from tests.multihost.hosts import Host, Network

from paramserver.estimator.checkpoint import inspect_checkpoint

pytestmark = [pytest.mark.multihost, pytest.mark.multiprocess]

MODEL_DIR = "/tmp/model"  # noqa: S108  # of each host

LOOP = f"""
{OWN_LOOP}
sys.stdin.readline()
train(20)
strategy.wait_for_workers()
say("at", strategy.global_step)
if strategy.is_chief:
    strategy.save("{MODEL_DIR}")
"""

CALLED = [
    pytest.param(by_name, ("ipv4",), id="names"),
    pytest.param(by_name, ("ipv6",), id="names-ipv6", marks=needs_ipv6),
    pytest.param(by_name, ("ipv6", "ipv4"), id="names-both", marks=needs_ipv6),
    pytest.param(by_ipv4, (), id="ipv4"),
    pytest.param(by_ipv6, (), id="ipv6", marks=needs_ipv6),
]


def placed(network: Network) -> dict[str, Host]:
    """The hosts of a run's tasks; the chief shares one with a ps."""
    one, two, three = network.add("one", "two", "three")
    return {"chief:0": one, "worker:0": two, "ps:0": one, "ps:1": three}


@pytest.mark.parametrize(("called", "families"), CALLED)
def test_an_own_loop(network: Network, called: Callable[[Host], str], families: tuple[str, ...]) -> None:
    hosts = placed(network)
    network.spread_own_names(*families)
    cluster = Cluster(hosts, LOOP, called=called)
    chief, worker, *servers = cluster.start_all()
    for task in (chief, worker):
        task.await_word("lanes")  # both are there
    for task in (chief, worker):
        task.tell()
    cluster.end(chief, worker, *servers)
    assert "<SharedMemoryLane to ps:0 by shared memory>, <TcpLane to ps:1 by tcp>" in chief.said
    assert "<TcpLane to ps:0 by tcp>, <TcpLane to ps:1 by tcp>" in worker.said
    assert "at 40" in chief.said
    assert inspect_checkpoint(str(hosts["chief:0"].path(MODEL_DIR))).step == 40
    assert not any(hosts[task].path(MODEL_DIR).exists() for task in ("worker:0", "ps:1"))


@pytest.mark.parametrize(("called", "families"), CALLED)
def test_an_estimator(network: Network, called: Callable[[Host], str], families: tuple[str, ...]) -> None:
    hosts = placed(network)
    hosts = {"evaluator:0": hosts["chief:0"], **hosts}
    network.spread_own_names(*families)
    cluster = Cluster(hosts, f"{ESTIMATOR}\nmain(100)", called=called)
    cluster.end(*cluster.start_all())
    found = inspect_checkpoint(str(hosts["chief:0"].path(MODEL_DIR)))
    assert found.step >= 100
    assert found.slots == ["step", "sum"]
    assert not hosts["ps:1"].path(MODEL_DIR).exists()
