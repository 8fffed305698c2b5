"""Who takes part and when a run is over: V04, Z10, Z11. A grace of no seconds stands for one that has passed."""

import pytest

from paramserver.errors import RefusedError, RunOverError
from paramserver.store.membership import Outlook, Roster

CHIEF, FIRST, SECOND = "chief:0", "worker:0", "worker:1"


def play(events):
    """A roster after events such as ``chief:0 joins``."""
    roster = Roster(CHIEF, [CHIEF, FIRST, SECOND])
    acts = {"joins": roster.join, "leaves": roster.leave, "drops": roster.disconnect}
    for event in filter(None, events.split(", ")):
        task, act = event.split()
        acts[act](task, "one start")
    return roster


JOINED = "chief:0 joins, worker:0 joins, worker:1 joins, "


@pytest.mark.parametrize(
    ("events", "outlook"),
    [
        pytest.param("", Outlook.GOING_ON, id="before the start"),
        pytest.param("worker:0 joins, worker:0 drops", Outlook.GOING_ON, id="without its chief no run has begun"),
        pytest.param(JOINED, Outlook.GOING_ON, id="all train"),
        pytest.param(JOINED + "chief:0 leaves", Outlook.GOING_ON, id="Z11: the others go on after the chief"),
        pytest.param(JOINED + "chief:0 leaves, worker:0 drops", Outlook.GOING_ON, id="one still trains"),
        pytest.param(JOINED + "worker:0 leaves, worker:1 leaves", Outlook.GOING_ON, id="Z12: the chief still trains"),
        pytest.param(JOINED + "chief:0 leaves, worker:0 leaves, worker:1 leaves", Outlook.OVER, id="V04: all left"),
        pytest.param(JOINED + "worker:0 leaves, worker:1 drops, chief:0 leaves", Outlook.OVER, id="Z10: one was lost"),
        pytest.param("chief:0 joins, chief:0 leaves", Outlook.ABSENT, id="others may be slow to start"),
        pytest.param("chief:0 joins, worker:0 joins, chief:0 leaves", Outlook.GOING_ON, id="not all were seen"),
        pytest.param(JOINED + "chief:0 drops", Outlook.GOING_ON, id="a lost chief is waited for"),
        pytest.param(JOINED + "worker:0 leaves, worker:1 leaves, chief:0 drops", Outlook.ABSENT, id="by nobody else"),
        pytest.param(JOINED + "chief:0 drops, chief:0 joins", Outlook.GOING_ON, id="a chief that came back"),
    ],
)
def test_the_outlook_follows_from_what_happened(events, outlook):
    assert play(events).outlook is outlook


@pytest.mark.parametrize(
    ("events", "complete"),
    [
        pytest.param("chief:0 joins, chief:0 leaves", True, id="who was never seen stays away"),
        pytest.param("chief:0 joins, chief:0 drops", False, id="the chief stays away"),
        pytest.param(JOINED + "worker:0 drops, worker:1 drops, chief:0 leaves", True, id="over at once"),
    ],
)
def test_the_absent_are_waited_for_until_the_grace_has_passed(events, complete):
    assert play(events).await_over(grace=0) is complete


def test_a_worker_that_comes_back_before_its_old_connection_ends_is_not_lost():
    roster = play("chief:0 joins, worker:0 joins, worker:0 joins, worker:0 drops")
    assert roster.joined() == (CHIEF, FIRST)


def test_who_comes_after_the_end_is_told_that_the_run_is_over():
    roster = play("chief:0 joins, chief:0 leaves")
    with pytest.raises(RunOverError, match=r"worker:1 .*chief:0 has finished"):
        roster.join(SECOND, "one start")


@pytest.mark.parametrize("stranger", ["worker:2", "evaluator:0", "ps:0", "observer:0", ""])
def test_who_is_no_worker_of_the_run_is_refused(stranger):
    with pytest.raises(RefusedError, match="does not take part") as caught:
        play("").join(stranger, "one start")
    assert FIRST in str(caught.value)


def test_the_chief_waits_for_the_workers_that_are_connected():
    roster = play("chief:0 joins, worker:1 joins")
    assert roster.await_alone(CHIEF, timeout=0) == (SECOND,)
    roster.disconnect(SECOND, "one start")
    assert roster.await_alone(CHIEF, timeout=60) == ()


@pytest.mark.parametrize(
    ("events", "absent"),
    [
        ("", [FIRST, SECOND]),
        ("worker:1 joins, worker:1 drops", [FIRST, SECOND]),
        ("worker:1 joins, worker:1 leaves", [FIRST]),
        ("worker:1 joins", [FIRST]),
    ],
)
def test_workers_that_may_come_back_are_absent(events, absent):
    roster = play(f"chief:0 joins, {events}")
    assert roster.absent(besides=CHIEF) == tuple(absent)


def test_the_chief_waits_for_the_absent_too_when_it_asks_for_them():
    roster = play("chief:0 joins, worker:1 joins, worker:1 leaves")
    assert roster.await_alone(CHIEF, timeout=0, absent=True) == ()


def test_stop_ends_every_wait():
    roster = play("chief:0 joins, worker:1 joins")
    roster.stop()
    assert roster.await_over(grace=60) is False
    assert roster.await_alone(CHIEF, timeout=60) == (SECOND,)


def test_h7_a_worker_has_left_when_all_its_incarnations_have():
    """Two strategies of one process are two of them, each with connections of its own."""
    roster = Roster(CHIEF, [CHIEF])
    roster.join(CHIEF, "first")
    roster.join(CHIEF, "second")
    roster.leave(CHIEF, "first")
    roster.disconnect(CHIEF, "first")
    assert roster.outlook is Outlook.GOING_ON
    roster.leave(CHIEF, "second")
    assert roster.outlook is Outlook.OVER


def test_a_connection_that_an_incarnation_has_replaced_does_not_undo_its_goodbye():
    roster = Roster(CHIEF, [CHIEF])
    roster.join(CHIEF, "start")
    roster.join(CHIEF, "start")
    roster.leave(CHIEF, "start")
    for _ in range(2):
        roster.disconnect(CHIEF, "start")
    assert roster.outlook is Outlook.OVER


def test_an_incarnation_that_is_lost_after_another_has_left_is_lost():
    roster = Roster(CHIEF, [CHIEF])
    roster.join(CHIEF, "first")
    roster.join(CHIEF, "second")
    roster.leave(CHIEF, "first")
    roster.disconnect(CHIEF, "second")
    assert roster.outlook is Outlook.ABSENT


def test_a3_the_strategies_of_a_process_are_numbered():
    roster = Roster(CHIEF, [CHIEF, FIRST])
    assert [roster.join(CHIEF, name) for name in ("p.1", "p.2", "p.1", "p.3")] == [0, 1, 0, 2]
    assert roster.join(FIRST, "q.1") == 0
    roster.leave(CHIEF, "p.2")
    assert roster.join(CHIEF, "p.4") == 3, "one that has left has taken its number with it"
    roster.disconnect(CHIEF, "p.3")
    assert roster.join(CHIEF, "p.5") == 2, "one that was lost is followed by the next one"


def test_a3_a_process_that_was_started_again_begins_with_the_first_model():
    roster = Roster(CHIEF, [CHIEF])
    assert [roster.join(CHIEF, name) for name in ("p.1", "p.2")] == [0, 1]
    assert [roster.join(CHIEF, name) for name in ("q.1", "q.2")] == [0, 1]
    for incarnation in ("p.1", "p.2"):
        roster.disconnect(CHIEF, incarnation)
    assert roster.join(CHIEF, "q.3") == 2
