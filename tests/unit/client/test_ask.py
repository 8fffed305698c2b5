"""What comes of a question, with a lane that answers what it was given before."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from paramserver.client.ask import WAIT_INTERVAL, Patience, ask, ask_all, ask_until_ready
from paramserver.client.exchange import Exchange
from paramserver.errors import DeadlineError, RefusedError, RemoteProtocolError
from paramserver.layout.arena import ArenaLayout
from paramserver.transport.lane import Lane, Piece, WorkerMemory
from paramserver.wire.messages import AwaitReady, Done, GetStatus, Goodbye, Refused, Reply, Request, State


class Answering(Lane):
    """Says these, one after the other."""

    name = "answering"

    def __init__(self, task: str, *answers: Reply) -> None:
        self.task = task
        self.asked: list[Request] = []
        self._answers = list(answers)

    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
        return WorkerMemory([], [])

    def renew(self) -> WorkerMemory:
        return WorkerMemory([], [])

    def start(self, request: Request, outgoing: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> None:
        self.asked.append(request)

    def finish(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Reply:
        return self._answers.pop(0)

    def close(self) -> None:
        """Nothing is open."""


def test_every_ps_is_asked_and_answers_in_its_place() -> None:
    lanes = [Answering(f"ps:{index}", State(True, index)) for index in range(3)]
    assert [state.global_step for state in ask_all(Exchange(lanes), GetStatus(), State)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (Refused("refused", "not now"), RefusedError, "not now"),
        (State(True, 7), RemoteProtocolError, r"ps:1 was expected to answer Done, and answered State\(.*7\)"),
    ],
)
def test_another_answer_is_an_error(answer: Reply, error: type[Exception], message: str) -> None:
    lane = Answering("ps:1", answer)
    with pytest.raises(error, match=message):
        ask(Exchange([lane]), lane, Goodbye(), Done)


def test_a_wait_goes_on_until_it_is_answered_and_says_so_meanwhile() -> None:
    lane, waits = Answering("ps:0", State(False, 0), State(False, 0), State(True, 5)), list[float]()
    ask_until_ready(Exchange([lane]), lane, AwaitReady, Patience(60, waits.append), "the chief sleeps")
    assert lane.asked == [AwaitReady(WAIT_INTERVAL)] * 3, "no ps is to wait for longer before it is heard of"
    assert len(waits) == 2
    assert 0 <= waits[0] <= waits[1] < 60


def test_a_wait_ends_and_names_what_it_was_for() -> None:
    lane = Answering("ps:0", State(False, 0))
    with pytest.raises(DeadlineError, match="the chief sleeps within 0 s; is it running?"):
        ask_until_ready(Exchange([lane]), lane, AwaitReady, Patience(0), "the chief sleeps")
    assert lane.asked == [AwaitReady(0.0)]


def test_n05_a_long_wait_for_the_chief_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = 0.0
    patience = Patience(75.0, clock=lambda: now)
    for _ in range(49):
        now += 1.5
        patience.wait_on("the chief has not initialized the variables on ps:0")
    waited = [
        re.search(r"^this task waits for the chief since \S+ \((\d+) s\), until \S+: the chief has", line)
        for line in caplog.messages
    ]
    assert [match and match[1] for match in waited] == ["10", "21", "42"]
