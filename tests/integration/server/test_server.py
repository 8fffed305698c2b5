"""A ps on real sockets: how it starts, whom it serves, and when it ends (V01, V02, V05, V07; V04, Z10)."""

import contextlib
import json
import os
import signal
import socket
import threading

import pytest
import torch
from tests.patience import patience

import paramserver as ps
from paramserver.cluster import ClusterSpec, Role, TaskId, as_tf_config
from paramserver.distribute import connection
from paramserver.errors import ConfigError, RefusedError, RunOverError, TokenError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import describe
from paramserver.layout.variables import VariableSpec
from paramserver.server.connection import Conversation
from paramserver.server.handler import RequestHandler
from paramserver.server.server import Server, run_standard_server
from paramserver.store.membership import Membership, Outlook
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.handshake import connect
from paramserver.transport.identity import Identity, new_incarnation
from paramserver.wire import messages

pytestmark = pytest.mark.usefixtures("each_strategy_is_a_process")

SGD = describe(torch.optim.SGD([torch.zeros(1)], lr=1.0), 0)
MODEL = [[ArenaLayout("float32", SGD, (VariableSpec("w", (4,), "float32"),))]]
ME = Identity(task="worker:0", token="", incarnation="once")
PATIENCE = patience(30.0)
"""Seconds after which a test gives up; nothing takes this long when it works."""

lanes = pytest.mark.parametrize("lane", ["auto", "tcp"])


class Joining:
    """A server's `join` on a thread, and what came of it."""

    def __init__(self, server):
        self.error = None
        self._thread = threading.Thread(target=self._join, args=(server,))
        self._thread.start()

    def _join(self, server):
        try:
            server.join()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            self.error = error

    def ended(self, within=PATIENCE):
        self._thread.join(within)
        return not self._thread.is_alive()


@pytest.fixture
def free():
    """A cluster of one ps, on a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    return {"chief": ["127.0.0.1:0"], "ps": [f"127.0.0.1:{port}"]}


# --- V01, V02, V05, V07


def test_the_job_and_the_index_may_be_left_out_where_there_is_one():
    server = Server({"ps": ["127.0.0.1:0"]}, start=False)
    assert server.task == TaskId(Role.PS, 0)
    server.stop()


@pytest.mark.parametrize(
    ("cluster", "job", "index", "error", "words"),
    [
        ({"ps": ["a:1"], "chief": ["b:1"]}, None, None, ValueError, "explicit job_name"),
        ({"ps": ["a:1", "b:1"]}, None, None, ValueError, "explicit task_index"),
        ({"ps": ["a:1"]}, "ps", 1, ValueError, "index 1"),
        ({"ps": ["a:1"]}, "ps", -1, ValueError, "index -1"),
        ({"ps": ["a:1"]}, "worker", 0, ValueError, "worker:0 cannot serve"),
        ({"ps": ["a:1"], "worker": ["b:1"]}, "worker", 0, ValueError, "worker:0 cannot serve"),
        (["a:1"], "ps", 0, TypeError, "cluster"),
        (None, "ps", 0, TypeError, "cluster"),
    ],
)
def test_a_task_that_is_none_is_refused(cluster, job, index, error, words):
    with pytest.raises(error, match=words):
        Server(cluster, job, index)


def test_a_server_serves_when_it_is_started(free):
    server = Server(free, "ps", 0, start=False)
    assert server.target == free["ps"][0]
    assert "ps:0" in repr(server)
    server.start()
    server.start()
    client = connection.to_cluster(ClusterSpec(free), TaskId(Role.CHIEF, 0), PATIENCE)
    assert client.status()[0].joined == ("chief:0",)
    client.close()
    server.stop()


def test_a_ps_that_comes_back_at_another_address_is_found_there(tmp_path, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("PARAMSERVER_TF_CONFIG_FILE", str(tmp_path / "cluster"))

    (tmp_path / "cluster").write_text("{}")

    def serve():
        server = Server.create_local_server()
        cluster = ClusterSpec({"chief": ["127.0.0.1:0"], "ps": [server.target]})
        (tmp_path / "cluster").write_text(as_tf_config(cluster, TaskId(Role.CHIEF, 0)))
        return server

    server = serve()
    strategy = ps.ParameterServerStrategy()
    model = torch.nn.Linear(2, 1)
    model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    server.stop()
    server = serve()
    strategy.recover()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert strategy.global_step == 1
    strategy.close()
    server.join()


def test_v03_a_local_server_picks_its_port():
    server = Server.create_local_server()
    cluster = ClusterSpec({"chief": ["127.0.0.1:0"], "ps": [server.target]})
    client = connection.to_cluster(cluster, TaskId(Role.CHIEF, 0), PATIENCE)
    client.goodbye()
    server.join()


def test_z18_a_server_that_has_stopped_frees_its_port(free):
    first = Server(free, "ps", 0)
    first.stop()
    second = Server(free, "ps", 0)
    assert second.target == first.target
    second.stop()


def test_a_port_that_is_taken_is_an_error_at_once_which_names_the_address():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=address) as caught:
            Server({"ps": [address]})
    assert caught.value.task == "ps:0"


@pytest.mark.parametrize(
    ("tf_config", "words"),
    [
        ("", "TF_CONFIG"),
        ({"task": {"type": "ps", "index": 0}}, "cluster"),
        ({"cluster": {"chief": ["a:1"], "ps": ["b:1"]}}, "task"),
        ({"cluster": {"ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}, "chief"),
    ],
)
def test_the_standard_server_says_what_is_missing_in_tf_config(monkeypatch, tf_config, words):
    monkeypatch.setenv("TF_CONFIG", tf_config and json.dumps(tf_config))
    with pytest.raises(ValueError, match=words):
        run_standard_server()


def test_stop_ends_a_join_without_an_error_and_may_come_first_or_twice(free):
    server = Server(free, "ps", 0, start=False)
    server.stop()
    server.stop()
    server.join()
    with LocalCluster(ps=1) as cluster:
        joining = Joining(cluster.servers[0])
        cluster.servers[0].request_stop()
        assert joining.ended()
        assert joining.error is None


def test_a_ps_can_wait_until_its_workers_have_left(monkeypatch):
    monkeypatch.setattr("paramserver.server.server.RECONNECTION", 0.01)
    with LocalCluster(ps=1) as cluster:
        worker = cluster.client("worker:0")
        waiting = threading.Thread(target=cluster.servers[0].await_alone, args=(PATIENCE,))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        worker.close()
        waiting.join(PATIENCE)
        assert not waiting.is_alive()


def test_stop_ends_the_waits_of_workers():
    with LocalCluster(ps=1) as cluster:
        worker = cluster.client("worker:0")
        errors = []

        def wait():
            try:
                worker.await_ready(PATIENCE, on_wait=lambda _: waits.set())
            except UnavailableError as error:
                errors.append(error)

        waits = threading.Event()
        thread = threading.Thread(target=wait)
        thread.start()
        assert waits.wait(PATIENCE)
        cluster.servers[0].stop()
        thread.join(PATIENCE)
    assert [error.task for error in errors] == ["ps:0"]


@lanes
def test_the_request_at_hand_is_answered_before_a_ps_ends(lane, monkeypatch):
    begun, drained, gate = threading.Event(), threading.Event(), threading.Event()
    handle, drain = RequestHandler.handle, Conversation.drain

    def handle_late(handler, session, request):
        begun.set()
        assert gate.wait(PATIENCE)
        handle(handler, session, request)

    def tell_drain(conversation):
        drain(conversation)
        drained.set()

    with LocalCluster(ps=1, lane=lane) as cluster:
        (worker,) = cluster.client("chief:0").lanes.each()
        monkeypatch.setattr(RequestHandler, "handle", handle_late)
        monkeypatch.setattr(Conversation, "drain", tell_drain)
        worker.start(messages.Pull(()))
        assert begun.wait(PATIENCE)
        stopping = threading.Thread(target=cluster.servers[0].stop)
        stopping.start()
        assert drained.wait(PATIENCE)
        gate.set()
        assert isinstance(worker.finish(), messages.State)
        stopping.join(PATIENCE)


# --- the end of a run: V04, Z10


@lanes
def test_join_ends_when_the_chief_and_the_others_have_said_goodbye(lane):
    with LocalCluster(ps=2, workers=2, lane=lane) as cluster:
        joinings = [Joining(server) for server in cluster.servers]
        chief, worker = cluster.client("chief:0"), cluster.client("worker:0")
        chief.goodbye()
        assert not joinings[0].ended(within=0)
        worker.goodbye()
        assert all(joining.ended() for joining in joinings)
        assert [joining.error for joining in joinings] == [None, None]


@lanes
def test_join_ends_when_a_worker_was_lost(lane):
    with LocalCluster(ps=1, workers=2, lane=lane) as cluster:
        joining = Joining(cluster.servers[0])
        cluster.client("worker:0").close()
        chief = cluster.client("chief:0")
        chief.await_workers()
        chief.goodbye()
        assert joining.ended()
        assert joining.error is None


@lanes
def test_a_worker_that_is_lost_before_its_answer_is_no_complaint(lane, caplog):
    with LocalCluster(ps=1, workers=2, lane=lane, token="right") as cluster:
        joining = Joining(cluster.servers[0])
        me = Identity(task="worker:0", token="right", incarnation=new_incarnation())
        worker = connect(cluster.servers[0].target, "ps:0", me, lane=lane, timeout=PATIENCE)
        worker.start(messages.GetStatus())
        worker.close()
        chief = cluster.client("chief:0")
        chief.await_workers()
        chief.goodbye()
        assert joining.ended()
    assert caplog.messages == []


def test_join_ends_when_a_worker_never_came():
    with LocalCluster(ps=1, workers=2, grace=0) as cluster:
        joining = Joining(cluster.servers[0])
        cluster.client("chief:0").goodbye()
        assert joining.ended()
        assert joining.error is None


def test_a_chief_that_is_lost_and_does_not_come_back_is_named():
    with LocalCluster(ps=1, workers=1, grace=0) as cluster:
        joining = Joining(cluster.servers[0])
        cluster.client("chief:0").close()
        assert joining.ended()
        assert isinstance(joining.error, UnavailableError)
        assert joining.error.task == "chief:0"


def test_a_chief_that_comes_back_finds_its_variables():
    with LocalCluster(ps=1, workers=1) as cluster:
        chief = cluster.client("chief:0")
        assert not chief.create(MODEL)
        chief.mark_ready(5)
        chief.close()
        again = cluster.client("chief:0")
        assert again.create(MODEL)
        assert again.read_global_step() == 5


def test_a_late_worker_is_told_that_the_run_is_over():
    with LocalCluster(ps=1, workers=3) as cluster:
        cluster.client("worker:0")
        cluster.client("chief:0").goodbye()
        late = cluster.client("worker:1")
        with pytest.raises(RunOverError, match=r"worker:1 .* chief:0"):
            late.await_ready(PATIENCE)


@lanes
def test_a_late_worker_that_goes_without_hearing_so_is_not_waited_for(lane):
    with LocalCluster(ps=1, workers=2, lane=lane) as cluster:
        joining = Joining(cluster.servers[0])
        cluster.client("chief:0").goodbye()
        cluster.client("worker:0").close()
        assert joining.ended()
        assert joining.error is None


@lanes
def test_a_chief_that_failed_is_told_to_the_others_and_to_the_caller_of_join(lane):
    with LocalCluster(ps=1, workers=3, lane=lane) as cluster:
        joining = Joining(cluster.servers[0])
        chief, worker = cluster.client("chief:0"), cluster.client("worker:0")
        chief.create(MODEL)
        chief.mark_ready(0)
        worker.join(MODEL)
        worker.open()
        chief.goodbye("ValueError: no data")
        late = cluster.client("worker:1")
        for call in (lambda: worker.pull([[0]]), lambda: late.await_ready(PATIENCE)):
            with pytest.raises(RefusedError, match=r"chief:0 failed.*ValueError: no data"):
                call()
        worker.goodbye()
        late.goodbye()
        cluster.servers[0].request_stop()  # worker:1 has not joined: the ps would give it its time
        assert joining.ended()
        assert "no data" in str(joining.error)


# --- strangers


@pytest.mark.parametrize("task", ["worker:7", "evaluator:0"])
def test_a_task_that_is_not_in_the_cluster_is_refused(task):
    with LocalCluster(ps=1, workers=2) as cluster:
        with pytest.raises(RefusedError, match=rf"{task} does not take part"):
            cluster.client(task).await_ready(PATIENCE)
        assert cluster.client("worker:0").status()[0].joined == ("worker:0",)


EXPOSED = {"chief": ["chief.example.invalid:1"], "ps": ["ps.example.invalid:0"]}


def test_without_a_token_no_other_host_is_listened_to():
    with pytest.raises(ConfigError, match=r"ps:0 has no token: .* ps\.example\.invalid:\d+ .*PARAMSERVER_TOKEN_FILE"):
        Server(EXPOSED, "ps", 0, token="")


def test_an_inherited_socket_is_not_listened_to_either_where_others_reach_it():
    listening = socket.create_server(("", 0))
    with pytest.raises(ConfigError, match="ps:0 has no token"):
        Server({"ps": ["127.0.0.1:0"]}, token="", descriptor=listening.detach())


@pytest.mark.parametrize("address", ["localhost:0", "127.0.0.1:0", "127.0.0.3:0", "[::1]:0"])
def test_on_a_loopback_address_no_token_is_needed(address):
    server = Server({"ps": [address]}, token="")
    server.stop()


def test_a_token_is_enough_for_any_address(caplog):
    Server(EXPOSED, "ps", 0, token="a secret").stop()
    assert caplog.messages == []


@pytest.mark.parametrize("said", ["argument", "environment"])
def test_who_wants_no_token_says_so_and_is_warned(said, monkeypatch, caplog):
    if said == "environment":
        monkeypatch.setenv("PARAMSERVER_INSECURE", "1")
    Server(EXPOSED, "ps", 0, token="", insecure=said == "argument").stop()
    (warning,) = caplog.messages
    assert warning.startswith("ps:0 has no token: everyone who reaches ps.example.invalid:")


def test_a_token_in_a_file_is_the_token_of_a_server(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("from a file\n")
    monkeypatch.delenv("PARAMSERVER_TOKEN", raising=False)
    monkeypatch.setenv("PARAMSERVER_TOKEN_FILE", str(tmp_path / "token"))
    cluster = ClusterSpec({"chief": ["127.0.0.1:0"], "ps": ["127.0.0.1:0"]})
    server = Server(cluster, "ps", 0)
    me = Identity(task="chief:0", token="from a file", incarnation=new_incarnation())
    connect(server.target, "ps:0", me, lane="auto", timeout=PATIENCE).close()
    server.stop()


def test_a_wrong_token_is_refused():
    with LocalCluster(ps=1, token="one") as cluster, pytest.raises(TokenError, match="worker:0"):
        connection.to_cluster(cluster.spec, TaskId(Role.WORKER, 0), PATIENCE, token="another")


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.0\r\n\r\n", b"PSRV\xff\0\0\0", b"PSRV\1\0\0\0" + b"\xff" * 99])
def test_a_stranger_disturbs_nobody(noise):
    with LocalCluster(ps=1) as cluster:
        host, _, port = cluster.servers[0].target.rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(noise)
        assert cluster.client("worker:0").status()[0].task == "ps:0"


def test_a_stranger_that_says_nothing_does_not_delay_the_end():
    with LocalCluster(ps=1) as cluster:
        host, _, port = cluster.servers[0].target.rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            assert stranger.recv(4) == b"PSRV"
            cluster.servers[0].stop()


def test_any_number_of_strangers_is_worth_one_line(caplog):
    with LocalCluster(ps=1, token="right") as cluster:
        for _ in range(20):
            me = Identity(task="worker:0", token="wrong", incarnation=new_incarnation())
            with pytest.raises(TokenError):
                connect(cluster.servers[0].target, "ps:0", me, lane="tcp", timeout=PATIENCE)
        cluster.client("worker:0")
    assert caplog.messages == [
        "ps:0 turned away a connection: ps:0 refused worker:0: it does not hold the token of this run; set "
        "PARAMSERVER_TOKEN to the same value for all tasks of a run"
    ]


def status_by(lane):
    lane.start(messages.GetStatus())
    return lane.finish()


def test_a_ps_that_cannot_start_a_thread_goes_on(monkeypatch, caplog):
    start, refusals = threading.Thread.start, []

    def refuse_once(thread):
        if thread.name == "ps:0 serves" and not refusals:
            refusals.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with LocalCluster(ps=1) as cluster:
        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        unlucky = connect(cluster.servers[0].target, "ps:0", ME, lane="tcp", timeout=PATIENCE)
        with contextlib.closing(unlucky), pytest.raises(UnavailableError):
            status_by(unlucky)
        assert cluster.client("worker:0").status()[0].joined == ("worker:0",)
    assert refusals
    (line,) = caplog.messages
    assert line.startswith("ps:0 cannot take another connection: RuntimeError: can't start new thread; raise the limit")


def test_a_signal_between_a_look_and_a_wait_is_not_lost(monkeypatch):
    """`join` finds the run going on, and only then begins to wait for a change."""
    looked: list[bool] = []
    outlook = Membership.outlook

    def look(membership: Membership) -> Outlook:
        if not looked:
            looked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            os.sched_yield()  # if this is the main thread, its handler runs here
        return outlook.fget(membership)

    monkeypatch.setattr(Membership, "outlook", property(look))
    with LocalCluster(ps=1, workers=1) as cluster:
        (server,) = cluster.servers
        too_late = threading.Timer(PATIENCE, server.request_stop)
        too_late.start()
        before = signal.signal(signal.SIGTERM, lambda *_: server.request_stop())
        try:
            server.join()
        finally:
            signal.signal(signal.SIGTERM, before)
            in_time = too_late.is_alive()
            too_late.cancel()
            too_late.join()
    assert looked
    assert in_time
