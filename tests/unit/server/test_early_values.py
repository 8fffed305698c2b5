"""Values that are sent while their push still comes in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import Rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import private_store_memory
from paramserver.server.handler import RequestHandler
from paramserver.store.membership import Membership
from paramserver.store.store import Store
from paramserver.transport.in_process import InProcessSession
from paramserver.transport.lane import LockPiece, Piece, SendValues
from paramserver.wire import messages

SGD = Rule("SGD", {"lr": 0.5})
LAYOUT = ArenaLayout("float32", SGD, (VariableSpec("w", (2 * BLOCK + 1,), "float32"),))
PUSH = messages.Push(1, 0, True, (messages.Part(0, "rule", None, SGD.settings),), (0,))


class Early(InProcessSession):
    """Keeps what it sends early.

    Attributes:
        sent: The first element of each piece, when it was sent.
        replied: The pieces of the last reply.
    """

    def __init__(self, task: str, store: Store) -> None:
        super().__init__(task, f"incarnation of {task}")
        self.sent: list[float] = []
        self.replied: Sequence[Piece] | None = None
        self.store = store

    def early_values(self, pieces: Sequence[Piece], lock: LockPiece) -> SendValues:
        def send(count: int) -> None:
            for piece in pieces[len(self.sent) : count]:
                with lock(piece):
                    self.sent.append(self.store.arenas[0].values[piece.start].item())

        return send

    def reply(
        self,
        reply: messages.Reply,
        pieces: Sequence[Piece] = (),
        lock: LockPiece | None = None,
        rows: Sequence[memoryview] = (),
    ) -> None:
        self.replied = pieces
        super().reply(reply, pieces, lock, rows)


@pytest.fixture
def session() -> Early:
    """A session beside another one of the same ps."""
    store = Store("ps:0", private_store_memory)
    membership = Membership("chief:0", ["chief:0", "worker:0"])
    made = Early("chief:0", store)
    made.handler = RequestHandler(store, membership)
    made.other = InProcessSession("worker:0", "incarnation of worker:0")
    made.handler.handle(made, messages.Declare((LAYOUT,), create=True))
    for each in (made, made.other):
        membership.join(each.task, each.incarnation)
        each.gradients = [torch.ones(LAYOUT.size)]
    return made


def test_each_piece_is_sent_when_it_is_applied_and_the_reply_has_none(session: Early) -> None:
    session.handler.handle(session, PUSH)
    assert session.sent == [-0.5] * 3
    assert session.replied == ()
    assert session.answer == messages.Applied(1, 0, session.answer.seconds, read_at=0)


def test_what_others_push_meanwhile_is_no_part_of_values_that_are_sent_already(session: Early) -> None:
    """And staleness is counted from the first of them."""
    taken = iter(range(3))

    def gradient(piece: Piece) -> torch.Tensor:
        if next(taken) == 1:
            session.handler.handle(session.other, PUSH)
        return InProcessSession.gradient(session, piece)

    session.gradient = gradient
    session.handler.handle(session, PUSH)
    assert session.sent == [-0.5, -1.0, -1.0]
    assert (session.answer.global_step, session.answer.staleness, session.answer.read_at) == (2, 1, 0)


def test_a_push_that_comes_again_is_answered_as_any_other(session: Early) -> None:
    session.handler.handle(session, PUSH)
    session.sent.clear()
    session.handler.handle(session, PUSH)
    assert session.sent == []
    assert session.replied == (Piece(0, 0, BLOCK), Piece(0, BLOCK, 2 * BLOCK), Piece(0, 2 * BLOCK, 2 * BLOCK + 1))
    assert session.answer.read_at is None
