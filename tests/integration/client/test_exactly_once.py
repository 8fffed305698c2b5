"""A push is applied once, however often it arrives, and by whichever connection."""

import numpy as np
import pytest
import torch

from paramserver.cluster import Role, TaskId
from paramserver.errors import UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import describe, describe_row_rule
from paramserver.layout.variables import VariableSpec
from paramserver.testing.local_cluster import CONNECT_TIMEOUT, LocalCluster
from paramserver.transport.handshake import connect
from paramserver.transport.identity import Identity
from paramserver.transport.lane import Piece, TableRows
from paramserver.wire import messages
from paramserver.wire.messages import Part, Push
from paramserver.wire.refusals import raised

pytestmark = pytest.mark.usefixtures("each_strategy_is_a_process")

SGD = describe(torch.optim.SGD([torch.zeros(1)], lr=1.0), 0)
MODEL = (ArenaLayout("float32", SGD, (VariableSpec("w", (8,), "float32"),)),)
PIECE = Piece(0, 0, 8)
ROW_RULE = describe_row_rule(torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, "w")
TABLE = (ArenaLayout("float32", ROW_RULE, (VariableSpec("w", (30, 4), "float32"),), is_table=True),)
IDS = np.array([1, 7, 8])


@pytest.fixture(params=["auto", "tcp"])
def dial(request):
    """Connects a task, as often as it is called, as the incarnation that it is given."""
    lanes = []
    with LocalCluster(ps=1, workers=2, lane=request.param, token="secret") as cluster:

        def dial(task, incarnation):
            me = Identity(task=task, token="secret", incarnation=incarnation)
            address = cluster.spec.address(TaskId(Role.PS, 0))
            lanes.append(connect(address, "ps:0", me, lane=request.param, timeout=CONNECT_TIMEOUT))
            return lanes[-1]

        yield dial
        while lanes:
            lanes.pop().close()


def ask(lane, request, outgoing=(), incoming=()):
    lane.start(request, outgoing)
    return lane.finish(incoming)


def begin(lane):
    """Declares the model on a lane; its memory, with gradients of ones."""
    assert isinstance(ask(lane, messages.Declare(MODEL, create=True)), messages.Declared)
    memory = lane.open(MODEL)
    memory.gradients[0].fill_(1)
    return memory


def push(lane, sequence, local_step=0):
    request = Push(sequence, local_step, True, (Part(0, "rule", None, SGD.settings),), (0,))
    return ask(lane, request, [PIECE], [PIECE])


def test_a_push_that_is_repeated_is_applied_once(dial):
    lane = dial("worker:0", "first")
    memory = begin(lane)
    assert [push(lane, 1).global_step for _ in range(3)] == [1, 1, 1]
    assert memory.values[0].tolist() == [-1] * 8
    assert push(lane, 2).global_step == 2
    assert memory.values[0].tolist() == [-2] * 8


def test_a_push_that_is_repeated_on_another_connection_is_applied_once(dial):
    lane = dial("worker:0", "first")
    begin(lane)
    push(lane, 1)
    lane.close()
    again = dial("worker:0", "first")
    memory = begin(again)
    assert push(again, 1).global_step == 1
    assert memory.values[0].tolist() == [-1] * 8


def test_a_task_that_was_started_again_counts_from_one_again(dial):
    begin(first := dial("worker:0", "first"))
    push(first, 1)
    memory = begin(second := dial("worker:0", "second"))
    assert push(second, 1).global_step == 2
    assert memory.values[0].tolist() == [-2] * 8


def test_a_push_that_was_refused_may_be_repeated(dial):
    lane = dial("worker:0", "first")
    memory = begin(lane)
    bad = Push(1, 0, True, (Part(0, "rule", None, {"params": 1.0}),), (0,))
    assert isinstance(ask(lane, bad, [PIECE], [PIECE]), messages.Refused)
    assert push(lane, 1).global_step == 1
    assert memory.values[0].tolist() == [-1] * 8


@pytest.mark.parametrize(
    "request_",
    [
        Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), ()),
        Push(1, 0, True, (Part(3, "add"),), ()),
        Push(1, 0, True, (), (7,)),
        messages.Pull((7,)),
        messages.Share(),
    ],
)
def test_what_comes_before_the_variables_are_declared_is_refused_and_changes_nothing(dial, request_):
    begin(dial("chief:0", "chief"))
    lane = dial("worker:0", "first")
    assert isinstance(ask(lane, request_), messages.Refused)
    lane.close()
    again = dial("worker:0", "second")
    memory = begin(again)
    assert push(again, 1).global_step == 1
    assert memory.values[0].tolist() == [-1] * 8


def test_a_ps_that_holds_nothing_counts_as_lost_for_a_worker_that_knew_it(dial):
    """It was started again, within the second in which a worker looks for it once more."""
    answer = ask(dial("chief:0", "chief"), messages.Declare(MODEL, create=False))
    assert isinstance(raised(answer, "ps:0"), UnavailableError)
    assert "ps:0 holds no variables of this run yet" in answer.message


@pytest.mark.parametrize("request_", [messages.Done(), messages.Challenge("ps:0", b"", "")])
def test_what_is_no_request_is_answered_and_ends_the_connection(dial, request_):
    lane = dial("worker:0", "first")
    answer = ask(lane, request_)
    assert "not a request" in answer.message
    again = dial("worker:0", "first")
    assert isinstance(ask(again, messages.GetStatus()), messages.Status)


def begin_table(lane):
    assert isinstance(ask(lane, messages.Declare(TABLE, create=True)), messages.Declared)
    lane.open(TABLE)


def push_rows(lane, sequence):
    """Gradients of ones for some rows of the table."""
    rows = TableRows(IDS, torch.ones(len(IDS), 4))
    request = Push(sequence, 0, True, (Part(0, "rule", None, ROW_RULE.settings, len(IDS)),), ())
    lane.start(request, (), [rows.id_bytes, rows.value_bytes])
    return lane.finish()


def rows_of(lane):
    """The same rows of the table."""
    rows = TableRows(IDS, torch.empty(len(IDS), 4))
    lane.start(messages.PullRows(((0, len(IDS)),)), (), [rows.id_bytes])
    lane.finish((), [rows.value_bytes])
    return rows.values


def test_rows_that_are_pushed_again_are_applied_once(dial):
    lane = dial("worker:0", "first")
    begin_table(lane)
    assert [push_rows(lane, 1).global_step for _ in range(3)] == [1, 1, 1]
    assert torch.equal(rows_of(lane), torch.full((3, 4), -1.0))
    assert push_rows(lane, 2).global_step == 2
    assert torch.equal(rows_of(lane), torch.full((3, 4), -2.0))


def test_rows_that_are_pushed_again_on_another_connection_are_applied_once(dial):
    lane = dial("worker:0", "first")
    begin_table(lane)
    push_rows(lane, 1)
    lane.close()
    again = dial("worker:0", "first")
    begin_table(again)
    assert push_rows(again, 1).global_step == 1
    assert torch.equal(rows_of(again), torch.full((3, 4), -1.0))
