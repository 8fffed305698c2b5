"""What `Exchange` does to several lanes at once, which here only write down what they are asked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paramserver.client.exchange import Call, Exchange
from paramserver.errors import LocalProtocolError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.transport.lane import Lane, Piece, WorkerMemory
from paramserver.wire.messages import Done, GetStatus, Push, Reply, Request, UpdateVariable


class Diary(Lane):
    """A lane that writes down what it is asked; one of a ps that died knows no answer."""

    name = "diary"

    def __init__(self, task: str, entries: list[str], *, is_lost: bool = False) -> None:
        self.task = task
        self._entries = entries
        self._is_lost = is_lost

    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
        return WorkerMemory([], [])

    def renew(self) -> WorkerMemory:
        return WorkerMemory([], [])

    def start(self, request: Request, outgoing: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> None:
        self._entries.append(f"start {self.task}")

    def finish(self, incoming: Sequence[Piece] = (), rows: Sequence[memoryview] = ()) -> Reply:
        self._entries.append(f"finish {self.task}")
        if self._is_lost:
            raise UnavailableError(f"lost {self.task}", self.task)
        return Done()

    def close(self) -> None:
        self._entries.append(f"close {self.task}")


def test_what_is_done_meanwhile_is_done_while_all_ps_tasks_are_at_work() -> None:
    entries: list[str] = []
    lanes = [Diary(task, entries) for task in ("ps:0", "ps:1")]
    replies = Exchange(lanes).run([Call(lane, GetStatus()) for lane in lanes], lambda: entries.append("meanwhile"))
    assert replies.replies == [Done(), Done()]
    assert entries == ["start ps:0", "start ps:1", "meanwhile", "finish ps:0", "finish ps:1"]


class Dialer:
    """Makes lanes that write to the same diary."""

    def __init__(self, entries: list[str]) -> None:
        self._entries = entries

    def dial_all(self, timeout: float, kept: Sequence[WorkerMemory] = ()) -> list[Lane]:
        return [Diary("ps:0", self._entries)]

    def redial(self, ps: int, kept: WorkerMemory | None) -> Lane:
        self._entries.append(f"dial ps:{ps}")
        return Diary(f"ps:{ps}", self._entries)


PUSH = Push(7, 0, True, (), ())


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("request_", [PUSH, GetStatus()], ids=["with a number", "without"])
def test_a_lane_that_was_interrupted_is_made_anew_and_what_has_a_number_is_asked_again(request_: Request) -> None:
    entries: list[str] = []
    lane = Diary("ps:0", entries)
    lanes = Exchange([lane], Dialer(entries))
    with pytest.raises(KeyboardInterrupt):
        lanes.run([Call(lane, request_)], interrupt)
    assert lanes.mend() == [Done()] * (request_ is PUSH)
    again = ["start ps:0", "finish ps:0"] if request_ is PUSH else []
    assert entries == ["start ps:0", "close ps:0", "dial ps:0", *again]
    assert lanes.mend() == []


def test_a_lane_that_cannot_be_made_anew_is_refused() -> None:
    lane = Diary("ps:0", [])
    lanes = Exchange([lane])
    with pytest.raises(KeyboardInterrupt):
        lanes.run([Call(lane, PUSH)], interrupt)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="ps:0 was left in the middle of a request"):
            lanes.run([Call(lane, GetStatus())])


def test_a_goodbye_does_not_follow_a_request_that_was_interrupted() -> None:
    entries: list[str] = []
    lane = Diary("ps:0", entries)
    lanes = Exchange([lane])
    with pytest.raises(KeyboardInterrupt):
        lanes.run([Call(lane, GetStatus())], interrupt)
    lanes.goodbye()
    assert entries == ["start ps:0", "close ps:0"]


def test_two_requests_to_one_ps_at_once_are_refused() -> None:
    """Z18: a worker cannot pile up requests on a ps."""
    entries: list[str] = []
    lane = Diary("ps:0", entries)
    with pytest.raises(LocalProtocolError, match="2 requests to 1 ps tasks at once"):
        Exchange([lane]).run([Call(lane, GetStatus())] * 2)
    assert entries == []


def test_what_is_asked_in_turn_is_asked_to_the_end() -> None:
    entries: list[str] = []
    lane = Diary("ps:0", entries)
    lanes = Exchange([lane], Dialer(entries))
    finish = lane.finish

    def once(*_: object) -> Reply:
        lane.finish = finish  # type: ignore[method-assign]
        raise KeyboardInterrupt

    lane.finish = once  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        lanes.run_in_turn([Call(lane, UpdateVariable(number, "v", "add", 0, b"")) for number in (1, 2, 3)])
    assert len(lanes.mend()) >= 3
    assert entries.count("start ps:0") >= 4


def test_all_answers_are_taken_in_when_one_ps_is_lost() -> None:
    entries: list[str] = []
    lanes = [Diary("ps:0", entries, is_lost=True), Diary("ps:1", entries)]
    with pytest.raises(UnavailableError, match="lost ps:0"):
        Exchange(lanes).run([Call(lane, GetStatus()) for lane in lanes])
    assert entries[-2:] == ["finish ps:0", "finish ps:1"]
