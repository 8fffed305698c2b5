"""A link of 100 Mbit/s, and one of 50 ms: runs work, and heartbeats come through beside steps that take seconds."""

from __future__ import annotations

import json

import pytest
from tests.multihost.cluster import FIRST_PORT, Cluster
from tests.multihost.hosts import Network

pytestmark = [pytest.mark.multihost, pytest.mark.multiprocess]

NBYTES = 25_000_000
RATE = "100mbit"

LOOP = f"""
import time, torch
import paramserver as ps
strategy = ps.ParameterServerStrategy()
model = torch.nn.Linear({NBYTES // 4}, 1, bias=False)
model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
data = torch.ones(1, {NBYTES // 4})
seconds = []
for _ in range(2):
    optimizer.zero_grad()
    model(data).sum().backward()
    before = time.perf_counter()
    optimizer.step()
    seconds.append(time.perf_counter() - before)
print("step", min(seconds), flush=True)
"""

SEND_AND_RECEIVE = f"""
import socket, time, sys
content = memoryview(bytearray({NBYTES}))
def receive(connection):
    done = 0
    while done < {NBYTES}:
        done += connection.recv_into(content[done:])
if sys.argv[1:] == ["serve"]:
    with socket.create_server(("", 2300)) as listening:
        print("listens", flush=True)
        connection, _ = listening.accept()
        receive(connection)
        connection.sendall(content)
        connection.recv(1)
else:
    with socket.create_connection(("two", 2300)) as connection:
        before = time.perf_counter()
        connection.sendall(content)
        receive(connection)
        print("step", time.perf_counter() - before, flush=True)
"""


def test_a_model_of_25_mb_trains_over_100_mbit(network: Network, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = network.add("one", "two")
    network.spread_own_names("ipv4")
    two.limit(RATE)
    for host in (one, two):
        host.write("/tmp/bare.py", SEND_AND_RECEIVE)  # noqa: S108  # the host's own
    serving = two.start("tests.multiprocess.script", "/tmp/bare.py", "serve", env={})  # noqa: S108
    serving.await_word("listens")
    bare = one.start("tests.multiprocess.script", "/tmp/bare.py", env={})  # noqa: S108
    assert bare.ends() == (0, "")
    cluster = Cluster({"chief:0": one, "ps:0": two}, LOOP, options=("--heartbeat-timeout", "2"))
    chief, server = cluster.start_all()
    cluster.end(chief, server)
    ours, theirs = (float(task.said.split()[-1]) for task in (chief, bare))
    with capsys.disabled():
        print(f"\n{NBYTES // 10**6} MB over {RATE}: a step takes {ours:.2f} s, bare sockets {theirs:.2f} s")  # noqa: T201


FAR_LOOP = """
import sys, torch
import paramserver as ps
strategy = ps.ParameterServerStrategy()
model, plain = (torch.nn.Linear(1_500_000, 2, bias=False) for _ in range(2))
plain.load_state_dict(model.state_dict())
plain_optimizer = torch.optim.Adagrad(plain.parameters(), lr=0.01)
model, optimizer = strategy.prepare(model, torch.optim.Adagrad(model.parameters(), lr=0.01))
data = torch.ones(1, 1_500_000)
for _ in range(4):
    for each, its_optimizer in ((model, optimizer), (plain, plain_optimizer)):
        its_optimizer.zero_grad()
        each(data).square().sum().backward()
        its_optimizer.step()
torch.testing.assert_close(model.weight, plain.weight, rtol=0, atol=0)
print("equal after", strategy.global_step, flush=True)
"""


def test_a_model_of_12_mb_trains_over_a_way_of_50_ms_as_plain_pytorch(network: Network) -> None:
    """Six blocks, whose values come back while the others are still on their way."""
    near, between, far = network.add("near", "between", "far")
    network.spread_own_names("ipv4")
    cluster = Cluster({"chief:0": near, "ps:0": far}, FAR_LOOP, options=("--heartbeat-timeout", "2"))
    server = cluster.start("ps:0")
    port = str(FIRST_PORT + 1)
    delay = between.start("tests.multihost.far", port, far.name, "0.05", env={})
    delay.await_word("passes on")
    config = {"cluster": {"chief": ["near:0"], "ps": [f"between:{port}"]}, "task": {"type": "chief", "index": 0}}
    chief = cluster.start("chief:0", TF_CONFIG=json.dumps(config))
    cluster.end(chief, server, delay)
    assert "equal after 4" in chief.said
