"""Any number in any request: one refusal, or an answer; and the ps and all others go on."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import get_args

import msgspec
import pytest
import torch
from tests.patience import patience

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import Rule, describe
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.server import handler
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.handshake import connect
from paramserver.transport.identity import Identity, new_incarnation, new_process
from paramserver.wire import codec, messages
from paramserver.wire.messages import Part

PATIENCE = patience(30.0)
ADAM = describe(torch.optim.Adam([torch.zeros(1)], lr=0.1), 0)
ADAGRAD = describe(torch.optim.Adagrad([torch.zeros(1)], lr=0.1), 0)
MODEL = (
    ArenaLayout("float32", ADAM, (VariableSpec("w", (4, 8), "float32", Shard("whole", 0, 0, 4)),)),
    ArenaLayout("float32", ADAGRAD, (VariableSpec("table", (10, 2), "float32"),), is_table=True),
)
OWN = VariableSpec("own", (3,), "int64")

REQUESTS = [
    messages.Declare(MODEL, create=True),
    messages.Share(),
    messages.Push(1, 0, True, (Part(0, "rule", ((0, 4), (8, 32)), ADAM.settings),), (0,)),
    messages.Push(1, 0, True, (Part(1, "rule", None, {"lr": 0.1}, rows=1),), (0,)),
    messages.Push(1, 0, True, (), (0,)),
    messages.Pull((0,)),
    messages.PullRows(((1, 1),)),
    messages.MarkReady(0),
    messages.AwaitReady(0.0),
    messages.MarkRestored(0),
    messages.AwaitRestored(0.0),
    messages.AwaitWorkers(0.0),
    messages.Save("not here", 0, 1),
    messages.Restore("not here", "", {}, {}),
    messages.ReadSlots(0, 1, ("w",)),
    messages.LoadSlots((messages.SlotGroup(("whole",), ADAM.settings),), {}),
    messages.Proceed(0.0),
    messages.CreateVariable(OWN, 0, b"\0" * 24),
    messages.AwaitVariable(OWN, 0.0),
    messages.ReadVariable("own", 0, 3),
    messages.UpdateVariable(1, "own", "add", 0, b"\0" * 8),
    messages.GetStatus(),
    messages.Heartbeat(),
    messages.Goodbye(),
]
EXTREMES = (-1, -(2**63), 2**40, 2**47, 2**62, 2**63 - 1, 2**64 - 1, math.nan, math.inf, -math.inf, -0.5, 1e300)


def test_every_request_is_tried():
    assert {type(request) for request in REQUESTS} == set(get_args(messages.Request))


def plain(request):
    """A request as lists, dicts, texts and numbers."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(request))


def changed(request):
    """Each way to replace one number of a request by an extreme one, as its path and the values to send."""
    whole = plain(request)
    for path in numbers(whole):
        for extreme in EXTREMES:
            values = copy.deepcopy(whole)
            *way, last = path
            inner = values
            for key in way:
                inner = inner[key]
            inner[last] = extreme
            yield path, extreme, values


def numbers(values, path=()):
    """The path of each number, but those of flags."""
    if isinstance(values, (list, dict)):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from numbers(value, (*path, key))
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield path


@pytest.fixture(params=["auto", "tcp"])
def cluster(request):
    with LocalCluster(ps=1, workers=3, lane=request.param, token="right") as its_cluster:
        yield its_cluster


@contextlib.contextmanager
def worker(cluster, task="worker:1"):
    """The lane of a worker that was just started."""
    me = Identity(task=task, token="right", incarnation=new_incarnation(new_process()))
    lane = connect(cluster.servers[0].target, "ps:0", me, lane=cluster._lane, timeout=PATIENCE)
    with contextlib.closing(lane):
        for first in (messages.Declare(MODEL, create=True), messages.CreateVariable(OWN, 0, b"\0" * 24)):
            lane.start(first)
            assert isinstance(lane.finish(), messages.Declared)
        lane.open(MODEL)
        yield lane


def answer(lane, values):
    """Send a request as it is, and return the last answer to it."""
    body = msgspec.msgpack.encode(values)
    lane._frames.send_raw(codec.head(len(body), 0) + body)
    reply = lane._frames.receive()
    while isinstance(reply, messages.Underway | messages.FilePiece):
        lane.start(messages.Proceed(0.0))
        reply = lane._frames.receive()
    return reply


def is_well(bystander, lane):
    """Whether a worker that has been there all the time is served as before."""
    bystander.start(messages.GetStatus())
    status = bystander.finish()
    bystander.start(messages.Pull((0,)))
    return isinstance(status, messages.Status) and isinstance(bystander.finish(), messages.State)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_an_extreme_number_is_answered_or_refused_and_harms_nobody(cluster, request_, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(handler, "LONGEST_WAIT", 0.001)
    with worker(cluster, "worker:0") as bystander:
        for path, extreme, values in changed(request_):
            with worker(cluster) as lane:
                reply = answer(lane, values)
            assert reply is not None, (path, extreme)
            assert is_well(bystander, lane), (path, extreme)
            assert "Traceback" not in caplog.text, (path, extreme)
    with worker(cluster) as lane:  # and what came before can be taken back
        lane.start(messages.MarkReady(0))
        assert lane.finish() == messages.Done()


# --- what has to be refused


def ask(cluster, request):
    with worker(cluster) as lane:
        return answer(lane, plain(request))


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (math.nan, "lr=nan is not a number"),
        (math.inf, "lr=inf: expected a finite number, 0 or more"),
        (-0.1, "lr=-0.1: expected a finite number, 0 or more"),
    ],
)
@pytest.mark.parametrize("part", [Part(0, "rule"), Part(1, "rule", rows=0)], ids=["dense", "rows"])
def test_a_learning_rate_that_cannot_be_meant_is_refused(cluster, lr, words, part):
    part = msgspec.structs.replace(part, settings={"lr": lr})
    reply = ask(cluster, messages.Push(1, 0, True, (part,), ()))
    assert isinstance(reply, messages.Refused)
    assert reply.message.endswith(words)


@pytest.mark.parametrize("settings", [{"betas": 0.9}, {"betas": (0.9,)}, {"eps": (1.0, 2.0)}, {"eps": math.nan}])
def test_a_setting_of_another_form_is_refused(cluster, settings):
    reply = ask(cluster, messages.Push(1, 0, True, (Part(0, "rule", None, settings),), ()))
    assert isinstance(reply, messages.Refused)
    assert "refused: 'rule' on arena 0: " in reply.message


@pytest.mark.parametrize("arena", [-3, -1, 2, 1000])
def test_an_arena_that_does_not_exist_is_refused(cluster, arena):
    for request in (messages.Pull((arena,)), messages.Push(1, 0, True, (Part(arena, "add"),), ())):
        assert isinstance(ask(cluster, request), messages.Refused)


def test_a_step_that_could_not_be_counted_on_is_refused(cluster):
    reply = ask(cluster, messages.MarkReady(2**64 - 1))
    assert isinstance(reply, messages.Refused)
    assert "Expected `int` <= 4611686018427387904" in reply.message


TOO_MANY = {
    "ranges": messages.Push(1, 0, True, (Part(0, "add", ((0, 1),) * 200_000),), ()),
    "parts": messages.Push(1, 0, True, (Part(1, "add", rows=0),) * 200_000, ()),
    "arenas to push": messages.Push(1, 0, True, (), (0,) * 200_000),
    "arenas to pull": messages.Pull((0,) * 200_000),
    "rows": messages.PullRows(((1, 0),) * 200_000),
}


@pytest.mark.parametrize("request_", TOO_MANY.values(), ids=TOO_MANY)
def test_more_than_there_is_is_refused_before_it_costs_anything(cluster, request_):
    reply = ask(cluster, request_)
    assert isinstance(reply, messages.Refused)
    assert "it names 200000" in reply.message


def test_ranges_that_overlap_are_refused(cluster):
    reply = ask(cluster, messages.Push(1, 0, True, (Part(0, "add", ((0, 8), (4, 12))),), ()))
    assert "[4, 12) begins before the end of the range before it, 8" in reply.message


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (ArenaLayout("float32", None, (VariableSpec("v", (-1,), "float32"),)), "Expected `int` >= 0"),
        (ArenaLayout("float32", None, (VariableSpec("v", (1,) * 65, "float32"),)), "Expected `array` of length <= 64"),
        (ArenaLayout("quaternion", None, ()), "quaternion"),
        (ArenaLayout("float32", Rule("SGD", {"lr": math.inf}), (VariableSpec("v", (1,), "float32"),)), "lr=inf"),
        (ArenaLayout("float32", Rule("SGD", {"lr": -1.0}), (VariableSpec("v", (1,), "float32"),)), "lr"),
        (ArenaLayout("float32", None, (VariableSpec("v", (2**47, 2**47), "float32"),)), "no memory|elements"),
    ],
    ids=["negative", "many dimensions", "dtype", "infinite lr", "negative lr", "large"],
)
def test_arenas_that_cannot_be_are_refused(layout, words, caplog):
    with LocalCluster(ps=1, workers=2, token="right") as cluster:
        me = Identity(task="worker:0", token="right", incarnation="w")
        lane = connect(cluster.servers[0].target, "ps:0", me, lane="auto", timeout=PATIENCE)
        with contextlib.closing(lane):
            lane.start(messages.Declare((layout,), create=True))
            reply = lane.finish()
    assert isinstance(reply, messages.Refused)
    assert any(word in reply.message for word in words.split("|"))
    assert "Traceback" not in caplog.text
