"""Observers of real ps tasks: they see everything, change nothing, and nobody waits for them."""

import json
import socket
import sys
import threading

import pytest
import torch
from tests.patience import patience
from typer.testing import CliRunner

from paramserver import cli
from paramserver.errors import DeadlineError, RefusedError, RemoteProtocolError, TokenError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import describe
from paramserver.layout.variables import VariableSpec
from paramserver.observe.status import Target, ask
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.handshake import connect
from paramserver.transport.identity import OBSERVER, Identity, new_incarnation
from paramserver.wire import messages
from paramserver.wire.messages import Part

ADAGRAD = describe(torch.optim.Adagrad([torch.zeros(1)]), 0)
MODEL = [[ArenaLayout("float32", ADAGRAD, (VariableSpec("w", (size,), "float32"),))] for size in (16, 48)]
PATIENCE = patience(30.0)


@pytest.fixture
def cluster():
    with LocalCluster(ps=2, workers=2, token="secret") as cluster:
        yield cluster


def addresses(cluster):
    return [server.target for server in cluster.servers]


def targets(cluster):
    return [Target(address) for address in addresses(cluster)]


def train(cluster, steps=3):
    """The chief, after some updates."""
    chief = cluster.client("chief:0")
    chief.create(MODEL)
    chief.open()
    chief.mark_ready(0)
    for _ in range(steps):
        chief.push_pull(chief.plan([[Part(0, "rule")]] * 2, [(0,)] * 2), counts=True)
    return chief


@pytest.fixture
def observer(cluster):
    """A session of an observer with ps:0; returns what it is answered."""
    me = Identity(task=OBSERVER, token="secret", incarnation=new_incarnation())
    lane = connect(addresses(cluster)[0], None, me, lane="tcp", timeout=PATIENCE)
    yield lane
    lane.close()


def answer(lane, request):
    lane.start(request)
    return lane.finish()


def test_an_observer_sees_what_each_ps_holds_and_does(cluster):
    train(cluster)
    first, second = ask(targets(cluster)[::-1], PATIENCE, token="secret")
    assert (first.task, second.task) == ("ps:0", "ps:1")
    assert (first.values_bytes, second.values_bytes) == (64, 192)
    assert first.slots_bytes >= 64
    assert (first.num_variables, first.updates, first.global_step, first.largest_staleness) == (1, 3, 3, 0)
    assert first.joined == ("chief:0",)


def test_an_observer_may_come_before_anybody_else(cluster):
    status, _ = ask(targets(cluster), PATIENCE, token="secret")
    assert (status.num_variables, status.updates, status.joined) == (0, 0, ())


def test_an_observer_of_a_run_that_failed_is_answered_too(cluster):
    train(cluster).goodbye("out of data")
    assert ask(targets(cluster), PATIENCE, token="secret")[0].updates == 3


@pytest.mark.parametrize(
    "request_",
    [
        messages.Declare((), True),
        messages.Push(1, 0, True, (), ()),
        messages.Pull(()),
        messages.MarkReady(7),
        messages.AwaitReady(PATIENCE),
        messages.AwaitWorkers(PATIENCE),
        messages.Save("/", 0, 1),
        messages.Restore("/", "", {}, {}),
        messages.Goodbye("out of spite"),
        messages.Done(),
    ],
    ids=lambda request: type(request).__name__,
)
def test_an_observer_may_ask_for_nothing_else(cluster, observer, request_):
    chief = train(cluster)
    refusal = answer(observer, request_)
    assert isinstance(refusal, messages.Refused)
    expected = f"ps:0 refused {type(request_).__name__} of observer:0: an observer may only ask for the status"
    assert refusal.message == expected
    status = answer(observer, messages.GetStatus())
    assert isinstance(status, messages.Status)
    assert (status.global_step, status.joined) == (3, ("chief:0",))
    assert chief.read_global_step() == 3


def test_v04_the_end_of_a_run_does_not_wait_for_an_observer(cluster, observer):
    chief = train(cluster)
    worker = cluster.client("worker:0")
    threads = [threading.Thread(target=server.join) for server in cluster.servers]
    for thread in threads:
        thread.start()
    assert isinstance(answer(observer, messages.GetStatus()), messages.Status)
    worker.goodbye()
    chief.goodbye()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_an_observer_that_goes_is_no_worker_that_is_lost(cluster, observer):
    train(cluster)
    observer.close()
    assert ask(targets(cluster), PATIENCE, token="secret")[0].joined == ("chief:0",)


def test_who_does_not_hold_the_token_learns_nothing(cluster):
    with pytest.raises(TokenError, match="ps:0 refused observer:0.*token"):
        ask(targets(cluster), PATIENCE, token="guessed")


def test_another_ps_than_the_cluster_says_is_named(cluster):
    with pytest.raises(RefusedError, match="looked for ps:1 and found ps:0"):
        ask([Target(addresses(cluster)[0], "ps:1")], PATIENCE, token="secret")


def test_an_address_where_nobody_is_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(DeadlineError, match=f"the ps at {address} did not come up within 0.2 s"):
        ask([Target(address)], timeout=0.2)


def test_a_ps_that_is_stopped_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as sock:  # the kernel takes the connection, and nobody says a word
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(DeadlineError, match=f"the ps at {address} did not come up within 0.2 s"):
            ask([Target(address)], timeout=0.2)


def test_something_else_at_an_address_is_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def speak():
            connection, _ = sock.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(RemoteProtocolError):
            ask([Target(f"127.0.0.1:{sock.getsockname()[1]}")], PATIENCE)
        thread.join()


# --- the command


def invoke(*arguments, **environment):
    return CliRunner().invoke(cli.app, ["status", *arguments], env={"COLUMNS": "80", **environment})


def test_the_command_shows_a_table_and_the_global_step(cluster):
    train(cluster)
    result = invoke(*addresses(cluster), PARAMSERVER_TOKEN="secret")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "ps:0", "ps:1", "global"]
    assert "0.50x" in lines[1]
    assert "1.50x" in lines[2]
    assert lines[3] == "global step: 3"


def test_the_command_finds_the_tasks_of_tf_config(cluster):
    train(cluster)
    result = invoke("--json", **cluster.environment("worker:0"))
    found = json.loads(result.output)
    assert found["global_step"] == 3
    assert [task["task"] for task in found["tasks"]] == ["ps:0", "ps:1"]


def test_a_ps_that_cannot_be_reached_is_one_line_and_exit_code_1(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    monkeypatch.setattr(sys, "argv", ["paramserver", "status", "--timeout", "0.2", address])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: the ps at {address} did not come up within 0.2 s")
    assert captured.err.count("\n") == 1
