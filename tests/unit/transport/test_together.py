"""Several exchanges at once on one thread, over pairs of sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import torch

from paramserver.errors import ParameterServerError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import tensor_bytes
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import Piece, whole_blocks
from paramserver.transport.tcp import TcpLane
from paramserver.transport.together import finish_together
from paramserver.wire import messages

LAYOUTS = [ArenaLayout("float32", None, (VariableSpec("v", (4, BLOCK), "float32"),))]
PUSH = messages.Push(1, 0, True, (messages.Part(0, "add"),), (0,))
APPLIED = messages.Applied(1, 0)
PIECES = whole_blocks(LAYOUTS)


class Pair:
    """A lane, and the bare connection at its other end."""

    def __init__(self, task: str) -> None:
        ours, theirs = socket.socketpair()
        self.frames, self.ps = FrameSocket(ours, task), FrameSocket(theirs, "worker:0")
        self.lane = TcpLane(self.frames)
        self.memory = self.lane.open(LAYOUTS)

    def answer(self, value: float) -> None:
        """Be a ps that sends values early, though it has read nothing of the push yet."""
        assert self.ps.receive() == PUSH
        values = torch.full((4 * BLOCK,), value)
        self.ps.begin(messages.EarlyValues(), [tensor_bytes(values)])
        taken = torch.empty(4 * BLOCK)
        self.ps.receive_into(tensor_bytes(taken))
        assert (taken == self.memory.gradients[0]).all()
        self.ps.send(APPLIED)


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Two ps tasks that have nothing of a push yet that is larger than what connections hold."""
    pairs = [Pair("ps:0"), Pair("ps:1")]
    with contextlib.ExitStack() as stack:
        for number, pair in enumerate(pairs):
            stack.callback(pair.frames.close)
            stack.callback(pair.ps.close)
            pair.memory.gradients[0].fill_(number + 0.5)
            pair.lane.start(PUSH, PIECES)
            assert pair.frames.is_sending
        yield pairs


def finished(pairs: list[Pair]) -> dict[int, messages.Reply | ParameterServerError]:
    """How each exchange has ended."""
    return dict(finish_together([pair.lane.finishing(PIECES) for pair in pairs]))


def test_both_move_at_once_in_both_directions(pairs: list[Pair]) -> None:
    """The second ps answers first, and the first one only when the second is done: no order is imposed on them."""
    done = threading.Event()

    def answer_in_turn() -> None:
        pairs[1].answer(1.5)
        done.set()
        pairs[0].answer(0.25)

    thread = threading.Thread(target=answer_in_turn)
    thread.start()
    assert finished(pairs) == {0: APPLIED, 1: APPLIED}
    thread.join()
    for pair, value in zip(pairs, (0.25, 1.5), strict=True):
        assert (pair.memory.values[0] == value).all()


def test_the_loss_of_one_does_not_end_the_other(pairs: list[Pair]) -> None:
    pairs[0].ps.close()
    thread = threading.Thread(target=pairs[1].answer, args=(2.0,))
    thread.start()
    ended = finished(pairs)
    thread.join()
    assert isinstance(ended[0], UnavailableError)
    assert ended[0].task == "ps:0"
    assert ended[1] == APPLIED


def test_a_connection_on_which_nothing_moves_is_given_up(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramserver.transport.together.LOOK_INTERVAL", 0.01)
    for pair in pairs:
        pair.frames.set_timeout(0.05)
    ended = finished(pairs)
    assert [str(ended[number]) for number in (0, 1)] == [
        f"ps:{number} neither sent nor took anything for 0.05 s; is that process stopped?" for number in (0, 1)
    ]


def test_another_thread_may_close_a_connection(pairs: list[Pair]) -> None:
    """As heartbeats do when a ps is silent."""
    threads = [threading.Thread(target=pair.lane.close) for pair in pairs]
    steps = finish_together([pair.lane.finishing(PIECES) for pair in pairs])
    for thread in threads:
        thread.start()
    assert all(isinstance(outcome, UnavailableError) for _, outcome in steps)
    for thread in threads:
        thread.join()


def test_rows_come_before_values(pairs: list[Pair]) -> None:
    """Also if they come in pieces."""
    pair, rows = pairs[0], torch.zeros(1000)
    thread = threading.Thread(target=_answer_with_rows, args=(pair,))
    thread.start()
    steps = pair.lane.finishing([Piece(0, 0, BLOCK)], [tensor_bytes(rows)])
    assert dict(finish_together([steps])) == {0: messages.State(True, 3)}
    thread.join()
    assert (rows == 7).all()
    assert (pair.memory.values[0][:BLOCK] == 8).all()


def _answer_with_rows(pair: Pair) -> None:
    pair.ps.receive()
    pair.ps.discard_payload()
    pair.ps.send(
        messages.State(True, 3), [tensor_bytes(torch.full((1000,), 7.0)), tensor_bytes(torch.full((BLOCK,), 8.0))]
    )
