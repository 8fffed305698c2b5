"""One ps and many connections: who stalls delays nobody, and nothing is left of those who came and went."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from tests.patience import patience

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.variables import VariableSpec
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.handshake import connect
from paramserver.transport.identity import Identity, new_incarnation
from paramserver.wire import codec, messages

MODEL = [[ArenaLayout("float32", None, (VariableSpec("w", (4096,), "float32"),))]]
PARTS = [[messages.Part(0, "add")]]
PATIENCE = patience(30.0)

lanes = pytest.mark.parametrize("lane", ["auto", "tcp"])


def ready(cluster):
    """The chief, which has made all values zero and the store ready, and its memory."""
    chief = cluster.client("chief:0")
    chief.create(MODEL)
    (memory,) = chief.open()
    chief.push_pull(chief.plan([[messages.Part(0, "assign")]], [[0]]), counts=False)
    chief.mark_ready(0)
    return chief, memory


def quick(cluster, task):
    """A worker that has made a quick request: it has added ones."""
    worker = cluster.client(task)
    worker.join(MODEL)
    (memory,) = worker.open()
    memory.gradients[0].fill_(1.0)
    push(worker)
    return worker


def push(worker):
    """A step of a worker."""
    return worker.push_pull(worker.plan(PARTS, [[0]]), counts=True)


def bare_lane(cluster, task, lane):
    """The lane of a worker that has declared its arenas and pulled them once."""
    me = Identity(task=task, token="right", incarnation=new_incarnation())
    bare = connect(cluster.servers[0].target, "ps:0", me, lane=lane, timeout=PATIENCE)
    for request in (messages.Declare(tuple(MODEL[0]), create=False), messages.Pull(())):
        bare.start(request)
        assert not isinstance(bare.finish(), messages.Refused)
    return bare


@lanes
def test_a_peer_that_stalls_within_a_frame_delays_nobody(lane):
    with LocalCluster(ps=1, workers=4, lane=lane, token="right") as cluster:
        ready(cluster)
        others = [quick(cluster, f"worker:{index}") for index in (0, 1)]
        stalled = bare_lane(cluster, "worker:2", lane)
        frame = codec.encode(messages.Pull(()))
        stalled._frames.send_raw(frame[:-1])
        for _ in range(10):
            for other in others:
                push(other)
        stalled._frames.send_raw(frame[-1:])
        assert stalled.finish() == messages.State(True, 22)
        stalled.close()


@lanes
@pytest.mark.parametrize("size", [100, 1 << 20])
def test_a_payload_that_does_not_come_delays_nobody(lane, size):
    with LocalCluster(ps=1, workers=3, lane=lane, token="right") as cluster:
        ready(cluster)
        other = quick(cluster, "worker:0")
        stalled = bare_lane(cluster, "worker:1", lane)
        stalled._frames.send_raw(codec.encode(messages.Pull(()), size))
        for _ in range(10):
            push(other)
        stalled.close()


@lanes
def test_a_peer_that_reads_no_answers_delays_nobody(lane):
    with LocalCluster(ps=1, workers=3, lane=lane, token="right") as cluster:
        ready(cluster)
        other = quick(cluster, "worker:0")
        deaf = bare_lane(cluster, "worker:1", lane)
        frame, num_sent = codec.encode(messages.Pull((0,))), 0
        while _fits(deaf._frames._socket, frame * 1000):
            num_sent += 1
            push(other)
        assert num_sent
        for _ in range(10):
            push(other)
        deaf.close()


def _fits(connection, data):
    try:
        return connection.send(data, socket.MSG_DONTWAIT) == len(data)
    except BlockingIOError:
        return False


@lanes
def test_a_damaged_length_ends_its_connection_at_once_and_no_other(lane):
    """Also while the connection waits among others, where a frame is only served when it is whole."""
    with LocalCluster(ps=1, workers=3, lane=lane, token="right") as cluster:
        ready(cluster)
        other = quick(cluster, "worker:0")
        damaged = bare_lane(cluster, "worker:1", lane)
        frame = bytearray(codec.encode(messages.Pull(())))
        frame[4] ^= 1
        damaged._frames.send_raw(bytes(frame))
        refusal = damaged.finish()
        assert refusal.message.startswith("worker:1 sent a frame with a damaged head")
        assert damaged._frames.receive() is None
        damaged.close()
        push(other)


@lanes
def test_a_worker_that_waits_delays_nobody(lane):
    with LocalCluster(ps=1, workers=4, lane=lane) as cluster:
        chief, _ = ready(cluster)
        workers = [quick(cluster, f"worker:{index}") for index in (0, 1)]
        waiting = threading.Thread(target=chief.await_workers)
        waiting.start()
        for _ in range(10):
            for worker in workers:
                push(worker)
        assert waiting.is_alive()
        for worker in workers:
            worker.goodbye()
        waiting.join(PATIENCE)
        assert not waiting.is_alive()


@lanes
def test_many_connections_share_a_thread_and_lose_nothing(lane):
    count, rounds = 24, 10
    with LocalCluster(ps=1, workers=count + 1, lane=lane) as cluster:
        chief, memory = ready(cluster)
        workers = [quick(cluster, f"worker:{index}") for index in range(count)]
        threads = [
            threading.Thread(target=lambda worker=worker: [push(worker) for _ in range(rounds - 1)])
            for worker in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        serving = [thread for thread in threading.enumerate() if thread.name == "ps:0 serves"]
        assert len(serving) <= 4
        chief.pull([[0]])
        assert torch.equal(memory.values[0], torch.full((4096,), float(count * rounds)))


@lanes
def test_of_connections_that_came_and_went_nothing_is_left(lane):
    with LocalCluster(ps=1, workers=2, lane=lane) as cluster:
        chief, _ = ready(cluster)
        for _ in range(20):
            quick(cluster, "worker:0").close()
        chief.await_workers()
        assert chief.status()[0].joined == ("chief:0",)
        quick(cluster, "worker:0")
