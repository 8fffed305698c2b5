"""What a ps answers about rows of tables, and every kind of nonsense that a peer may send."""

import numpy as np
import pytest
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import describe, describe_row_rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import private_store_memory, tensor_bytes
from paramserver.server.handler import RequestHandler
from paramserver.store.membership import Membership
from paramserver.store.store import Store
from paramserver.transport.in_process import InProcessSession
from paramserver.wire import messages
from paramserver.wire.messages import Part, PullRows, Push

OPTIMIZER = torch.optim.SGD([torch.zeros(1)], lr=0.5)
SGD, ROW_RULE = describe(OPTIMIZER, 0), describe_row_rule(OPTIMIZER, 0, "words")
MODEL = (
    ArenaLayout("float32", ROW_RULE, (VariableSpec("words", (6, 2), "float32"),), is_table=True),
    ArenaLayout("float32", SGD, (VariableSpec("w", (3,), "float32"),)),
)


class Ps:
    """A handler and a session of a chief that has created `MODEL`."""

    def __init__(self):
        self.store = Store("ps:1", private_store_memory)
        self.handler = RequestHandler(self.store, Membership("chief:0", ["chief:0"]))
        self.session = InProcessSession("chief:0", "an incarnation")
        assert self.ask(messages.Declare(MODEL, create=True)) == messages.Declared(ready=False)
        self.session.gradients = [torch.empty(0), torch.ones(3)]

    def ask(self, request, *ids):
        """Send a request with ids and, if it pushes, ones for each of them."""
        rows = [np.array(ids, np.int64).view(np.uint8).data]
        if isinstance(request, Push):
            rows.append(tensor_bytes(torch.ones(len(ids), 2)))
        self.session.rows = rows if ids else []
        self.handler.handle(self.session, request)
        answer, self.session.answer = self.session.answer, None
        return answer

    def pulled(self, *ids):
        """The first element of each row."""
        assert self.ask(PullRows(((0, len(ids)),)), *ids) == messages.State(True, self.store.global_step)
        (rows,) = self.session.rows
        return torch.frombuffer(rows, dtype=torch.float32).view(-1, 2)[:, 0].tolist()


@pytest.fixture
def ps():
    return Ps()


def push(*parts):
    return Push(1, 0, True, parts, ())


def rows(count, operation="rule", arena=0, **settings):
    return Part(arena, operation, None, {**ROW_RULE.settings, **settings} if operation == "rule" else None, count)


def test_a_push_of_rows_runs_the_rule_on_them_and_a_pull_brings_them(ps):
    assert ps.ask(push(rows(2)), 1, 4).global_step == 1
    assert ps.pulled(0, 1, 4, 5) == [0.0, -0.5, -0.5, 0.0]


class Changing(InProcessSession):
    """A worker that changes the ids of a push, in memory that it shares, when the ps goes on to the values."""

    def take_rows(self, nbytes):
        taken = np.asarray(self.rows.pop(0))
        if self.rows:
            self.shared = taken
        else:
            self.shared.fill(127)
        return taken


def test_ids_that_change_after_they_were_checked_change_nothing(ps):
    ps.session.__class__ = Changing
    assert ps.ask(push(rows(2)), 1, 4).global_step == 1
    ps.session.__class__ = InProcessSession
    assert (ps.session.shared == 127).all()
    assert ps.pulled(0, 1, 4, 5) == [0.0, -0.5, -0.5, 0.0]


def test_rows_and_whole_arenas_go_in_one_push(ps):
    ps.ask(push(Part(1, "rule", None, SGD.settings), rows(1)), 3)
    assert ps.pulled(3) == [-0.5]
    assert ps.store.arenas[1].values.tolist() == [-0.5] * 3


NONSENSE = {
    "a row beyond the end": (push(rows(1)), (6,)),
    "a row before the first": (push(rows(1)), (-1,)),
    "a row twice": (push(rows(2)), (1, 1)),
    "rows that descend": (push(rows(2)), (2, 1)),
    "more rows than there are": (push(rows(7)), (0, 1, 2, 3, 4, 5, 6)),
    "fewer than no rows": (push(rows(-1)), ()),
    "rows of what is no table": (push(rows(1, "add", arena=1)), (1,)),
    "rows of an arena that is not there": (push(rows(1, "add", arena=2)), (1,)),
    "ranges of a table": (push(Part(0, "add", ((0, 2),))), ()),
    "all of a table at once": (push(Part(0, "add")), ()),
    "an unknown setting": (push(rows(1, params=1.0)), (1,)),
    "a setting that would change other rows": (push(rows(1, weight_decay=0.1)), (1,)),
    "good rows and a bad arena": (push(rows(1), Part(1, "add", ((9, 99),))), (1,)),
    "a pull of a row beyond the end": (PullRows(((0, 1),)), (6,)),
    "a pull of a row twice": (PullRows(((0, 2),)), (1, 1)),
    "a pull of fewer than no rows": (PullRows(((0, -1),)), ()),
    "a pull of rows of what is no table": (PullRows(((1, 1),)), (0,)),
    "a pull of rows of an arena that is not there": (PullRows(((5, 1),)), (0,)),
}


@pytest.mark.parametrize(("request_", "ids"), NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_about_rows_is_refused_and_changes_nothing(ps, request_, ids):
    refusal = ps.ask(request_, *ids)
    assert isinstance(refusal, messages.Refused)
    assert "ps:1" in refusal.message
    assert not ps.store.arenas[0].values.any()
    assert not ps.store.arenas[1].values.any()
    assert ps.store.global_step == 0
    assert ps.ask(push(rows(1)), 2).global_step == 1
    assert ps.pulled(1, 2) == [0.0, -0.5]
