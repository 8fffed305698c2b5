"""Hosts that disappear without a word, come back, or are replaced by others; links that are slow."""

from __future__ import annotations

import pytest
from tests.multihost.cluster import ESTIMATOR, OWN_LOOP, TOKEN, Cluster
from tests.multihost.hosts import Network

pytestmark = [pytest.mark.multihost, pytest.mark.multiprocess]

LIMIT = "2"
"""Seconds after which a silent task counts as lost."""

FOLLOWS_ORDERS = f"""
{OWN_LOOP}
say("trains")
for order in sys.stdin:
    try:
        if order == "wait\\n":
            strategy.client.await_workers()
            say("is alone")
            continue
        train(int(order))
        say("made", order.strip(), "at", strategy.global_step)
    except ps.errors.UnavailableError as error:
        say("lost:", error)
        strategy.recover(timeout=100)
        say("recovered at", strategy.global_step)
"""


UNTIL_TOLD = f"""
{ESTIMATOR}
import logging, threading
logging.getLogger("paramserver").addHandler(logging.StreamHandler(sys.stdout))
told = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
class UntilTold(ps.estimator.TrainingHook):
    def after_run(self, context, values):
        if values.global_step > 50:
            say("trains at", values.global_step)
        if told.is_set():
            context.request_stop()
main(None, save_checkpoints_steps=20)
""".replace("hooks=[Teller()]", "hooks=[Teller(), UntilTold()]")


@pytest.mark.parametrize("lost", ["worker:0", "chief:0"])
def test_a_worker_whose_host_disappears_is_missed_and_comes_back(network: Network, lost: str) -> None:
    one, two, three = network.add("one", "two", "three")
    network.spread_own_names("ipv4")
    hosts = {"chief:0": one, "worker:0": two, "ps:0": three, "ps:1": three}
    cluster = Cluster(hosts, FOLLOWS_ORDERS, options=("--heartbeat-timeout", LIMIT))
    tasks = dict(zip(hosts, cluster.start_all(), strict=True))
    other = tasks["worker:0" if lost == "chief:0" else "chief:0"]
    for task in (tasks[lost], other):
        task.await_word("trains")
        task.tell("3")
        task.await_word("made 3")
    hosts[lost].unplug()
    tasks[lost].tell("3")
    tasks[lost].await_word("lost: ")
    other.tell("10")  # goes on meanwhile
    other.await_word("made 10")
    other.tell("wait")
    other.await_word("is alone")
    hosts[lost].plug()
    tasks[lost].await_word("recovered at")
    tasks[lost].tell("3")
    tasks[lost].await_word("made 3 at")
    assert "has given no sign of life for 2 s, and counts as lost" in tasks[lost].said
    for task in (tasks[lost], other):
        code, _ = task.ends()
        assert code == 0
    code, complaints = tasks["ps:0"].ends()
    assert code == 0
    assert f"ps:0 has not heard of {lost} for 2 s: it counts as lost" in complaints
    cluster.end(tasks["ps:1"])


def test_a_ps_whose_host_disappears_is_waited_for(network: Network) -> None:
    one, two, three = network.add("one", "two", "three")
    network.spread_own_names("ipv4")
    hosts = {"chief:0": one, "worker:0": two, "ps:0": one, "ps:1": three}
    cluster = Cluster(hosts, FOLLOWS_ORDERS, options=("--heartbeat-timeout", LIMIT))
    chief, worker, *servers = cluster.start_all()
    for task in (chief, worker):
        task.await_word("trains")
        task.tell("3")
        task.await_word("made 3")
    three.unplug()
    for task in (chief, worker):
        task.tell("3")
        task.await_word("lost: ps:1 has given no sign of life for 2 s, and counts as lost")
    three.plug()
    for task in (chief, worker):
        task.await_word("recovered at")
    for task in (chief, worker):
        task.tell("3")
        task.await_word("made 3 at")
    cluster.end(chief, worker, *servers)


@pytest.mark.parametrize("lost", ["worker:0", "chief:0", "ps:1"])
def test_an_estimator_gets_over_a_host_that_disappears_for_a_while(network: Network, lost: str) -> None:
    one, two, three, four = network.add("one", "two", "three", "four")
    network.spread_own_names("ipv4")
    hosts = {"chief:0": one, "worker:0": two, "ps:0": three, "ps:1": four}
    cluster = Cluster(hosts, UNTIL_TOLD, options=("--heartbeat-timeout", LIMIT))
    tasks = dict(zip(hosts, cluster.start_all(), strict=True))
    for task in ("chief:0", "worker:0"):
        tasks[task].await_word("trains at")
    hosts[lost].unplug()
    for task in {"chief:0", "worker:0"} if lost == "ps:1" else {lost}:
        tasks[task].await_word("has given no sign of life for 2 s, and counts as lost")
    hosts[lost].plug()
    for task in ("worker:0", "chief:0") if lost == "worker:0" else ("chief:0", "worker:0"):  # the lost one first
        tasks[task].await_word("begins at" if lost in (task, "ps:1") else "trains at")
        tasks[task].await_word("trains at")
    for task in ("chief:0", "worker:0"):
        tasks[task].tell()
    cluster.end(*tasks.values())


def test_a_ps_is_replaced_at_its_name_with_another_address(network: Network) -> None:
    one, two, three = network.add("one", "two", "three")
    network.spread_own_names("ipv4")
    hosts = {"chief:0": one, "worker:0": two, "ps:0": one, "ps:1": three}
    cluster = Cluster(hosts, UNTIL_TOLD, options=("--heartbeat-timeout", LIMIT))
    chief, worker, first, old = cluster.start_all()
    for task in (chief, worker):
        task.await_word("trains")
    three.unplug()
    old.kill()
    (four,) = network.add("four")
    network.spread({"one": [one.ipv4], "two": [two.ipv4], "three": [four.ipv4]})
    cluster.hosts["ps:1"] = four
    new = cluster.start("ps:1")
    for task in (chief, worker):
        task.await_word("begins at")
    for task in (chief, worker):
        task.tell()
    cluster.end(chief, worker, first, new)


def test_a_ps_that_others_reach_needs_a_token(network: Network) -> None:
    one, _ = network.add("one", "two")
    network.spread_own_names("ipv4")
    hosts = {"chief:0": one, "ps:0": one}
    code, complaints = Cluster(hosts, OWN_LOOP, env={}).start("ps:0").ends()
    assert code == 1
    assert "error: ps:0 has no token: everyone who reaches one:2223 could read and change the model" in complaints


def test_a_worker_with_another_token_is_refused(network: Network) -> None:
    one, two = network.add("one", "two")
    network.spread_own_names("ipv4")
    cluster = Cluster({"chief:0": one, "worker:0": two, "ps:0": one}, FOLLOWS_ORDERS)
    server, chief = cluster.start("ps:0"), cluster.start("chief:0")
    code, complaints = cluster.start("worker:0", PARAMSERVER_TOKEN=f"{TOKEN}?").ends()
    assert code == 1
    assert "ps:0 refused worker:0: it does not hold the token of this run" in complaints
    chief.await_word("trains")
    cluster.end(chief)
    server.kill()  # it would go on to wait for a worker that has never been there
