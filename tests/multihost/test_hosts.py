"""The rig itself: hosts see nothing of each other but what goes through the network, and leave nothing."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.transport.ipv6 import needs_ipv6
from tests.multihost.hosts import ROOT, Network
from tests.patience import patience

pytestmark = [pytest.mark.multihost, pytest.mark.multiprocess]

LISTEN = """
import socket
listening = socket.create_server(("::", 2222), family=socket.AF_INET6, dualstack_ipv6=True)
local = socket.socket(socket.AF_UNIX)
local.bind(chr(0) + "abstract")
local.listen()
print("listens", flush=True)
while True:
    listening.accept()[0].send(b"hello")
"""
CALL = """
import socket, sys
with socket.create_connection((sys.argv[1], 2222), 5) as connection:
    print(connection.recv(5).decode(), connection.getpeername()[0])
try:
    socket.socket(socket.AF_UNIX).connect(chr(0) + "abstract")
except OSError as error:
    print(error.strerror)
"""
HANG = """
import sys, time
from tests.multihost.hosts import Network
network = Network(None)
network.__enter__().add("one", "two")
print(*[host.root.parent.name for host in network.hosts.values()], flush=True)
sys.stdin.read()
"""


def test_hosts_share_no_file_and_no_socket_but_a_network(network: Network) -> None:
    one, two = network.add("one", "two")
    network.spread_own_names("ipv4")
    for folder in ("/tmp", "/dev/shm"):  # noqa: S108  # the hosts' own
        one.write(f"{folder}/file", "of one")
        assert not two.path(f"{folder}/file").exists()
        assert not Path(folder, "file").exists()
    assert [host.run("hostname").stdout for host in (one, two)] == ["one\n", "two\n"]
    listening = one.start("tests.multiprocess.script", one.write("/tmp/listen.py", LISTEN), env={})  # noqa: S108
    listening.await_word("listens")
    answers = [host.run(sys.executable, "-c", CALL, "one").stdout.splitlines() for host in (one, two)]
    assert answers == [["hello 10.0.0.1"], ["hello 10.0.0.1", "Connection refused"]]


@needs_ipv6
def test_a_name_may_have_an_ipv6_address_alone(network: Network) -> None:
    one, two = network.add("one", "two")
    network.spread_own_names("ipv6")
    listening = one.start("tests.multiprocess.script", one.write("/tmp/listen.py", LISTEN), env={})  # noqa: S108
    listening.await_word("listens")
    assert two.run(sys.executable, "-c", CALL, "one").stdout.startswith("hello fd00::1")


def test_a_cable_may_be_out_for_a_while(network: Network) -> None:
    one, two = network.add("one", "two")
    network.spread_own_names("ipv4")
    listening = one.start("tests.multiprocess.script", one.write("/tmp/listen.py", LISTEN), env={})  # noqa: S108
    listening.await_word("listens")
    one.unplug()
    assert "hello" not in two.run(sys.executable, "-c", CALL.replace("5) as", "0.3) as"), "one").stdout
    one.plug()
    assert "hello" in two.run(sys.executable, "-c", CALL, "one").stdout


def test_a_test_run_that_is_killed_leaves_no_host() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", HANG],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    holders = [os.pidfd_open(int(pid)) for pid in run.stdout.readline().split()]
    assert len(holders) == 2
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=patience(10))
    for holder in holders:
        assert select.select([holder], [], [], patience(10))[0], "the namespaces of a host are held still"
        os.close(holder)
