"""What `Lanes` does to several lanes at once, which here only write down what they are asked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paramserver.arena import ArenaLayout
from paramserver.errors import ConfigError, UnavailableError
from paramserver.lanes import Call, Lanes
from paramserver.transport.lane import Lane, Piece, WorkerMemory
from paramserver.wire.messages import Done, GetStatus, Reply, Request


class Diary(Lane):
    """A lane that writes down what it is asked; one of a ps that died knows no answer."""

    name = "diary"

    def __init__(self, task: str, entries: list[str], *, is_lost: bool = False) -> None:
        self.task = task
        self._entries = entries
        self._is_lost = is_lost

    def open(self, layouts: Sequence[ArenaLayout], kept: WorkerMemory | None = None) -> WorkerMemory:
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
    replies = Lanes(lanes).exchange([Call(lane, GetStatus()) for lane in lanes], lambda: entries.append("meanwhile"))
    assert replies == [Done(), Done()]
    assert entries == ["start ps:0", "start ps:1", "meanwhile", "finish ps:0", "finish ps:1"]


def test_an_error_meanwhile_leaves_no_answer_behind() -> None:
    entries: list[str] = []
    lane = Diary("ps:0", entries)
    lanes = Lanes([lane])

    def fail() -> None:
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        lanes.exchange([Call(lane, GetStatus())], fail)
    lanes.goodbye()  # which is a request: a lane that was left in the middle of another is only closed
    assert entries == ["start ps:0", "finish ps:0", "start ps:0", "finish ps:0", "close ps:0"]


def test_all_answers_are_taken_in_when_one_ps_is_lost() -> None:
    entries: list[str] = []
    lanes = [Diary("ps:0", entries, is_lost=True), Diary("ps:1", entries)]
    with pytest.raises(UnavailableError, match="lost ps:0"):
        Lanes(lanes).exchange([Call(lane, GetStatus()) for lane in lanes])
    assert entries[-2:] == ["finish ps:0", "finish ps:1"]
