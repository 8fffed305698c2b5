"""Who takes part and when a run is over: V04, Z10, Z11. A grace of no seconds stands for one that has passed."""

import pytest

from paramserver.errors import RefusedError, RunOverError, UnavailableError
from paramserver.store.membership import Membership, Outlook

CHIEF, FIRST, SECOND = "chief:0", "worker:0", "worker:1"


def play(events):
    """A membership after events such as ``chief:0 joins``."""
    membership = Membership(CHIEF, [CHIEF, FIRST, SECOND])
    acts = {"joins": membership.join, "leaves": membership.leave, "drops": membership.disconnect}
    for event in filter(None, events.split(", ")):
        task, act = event.split()
        acts[act](task, "one start")
    return membership


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
    membership = play("chief:0 joins, worker:0 joins, worker:0 joins, worker:0 drops")
    assert membership.joined() == (CHIEF, FIRST)


def test_who_comes_after_the_end_is_told_that_the_run_is_over():
    membership = play("chief:0 joins, chief:0 leaves")
    with pytest.raises(RunOverError, match=r"worker:1 .*chief:0 has finished"):
        membership.join(SECOND, "one start")


@pytest.mark.parametrize("stranger", ["worker:2", "evaluator:0", "ps:0", "observer:0", ""])
def test_who_is_no_worker_of_the_run_is_refused(stranger):
    with pytest.raises(RefusedError, match="does not take part") as caught:
        play("").join(stranger, "one start")
    assert FIRST in str(caught.value)


def test_the_chief_waits_for_the_workers_that_are_connected():
    membership = play("chief:0 joins, worker:1 joins")
    assert membership.await_alone(CHIEF, timeout=0) == (SECOND,)
    membership.disconnect(SECOND, "one start")
    assert membership.await_alone(CHIEF, timeout=60) == ()


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
    membership = play(f"chief:0 joins, {events}")
    assert membership.absent(besides=CHIEF) == tuple(absent)


def test_the_chief_waits_for_the_absent_too_when_it_asks_for_them():
    membership = play("chief:0 joins, worker:1 joins, worker:1 leaves")
    assert membership.await_alone(CHIEF, timeout=0, absent=True) == ()


def test_stop_ends_every_wait():
    membership = play("chief:0 joins, worker:1 joins")
    membership.stop()
    assert membership.await_over(grace=60) is False
    assert membership.await_alone(CHIEF, timeout=60) == (SECOND,)


def test_a_worker_has_left_when_all_its_incarnations_have():
    """Two strategies of one process are two of them, each with connections of its own."""
    membership = Membership(CHIEF, [CHIEF])
    membership.join(CHIEF, "first")
    membership.join(CHIEF, "second")
    membership.leave(CHIEF, "first")
    membership.disconnect(CHIEF, "first")
    assert membership.outlook is Outlook.GOING_ON
    membership.leave(CHIEF, "second")
    assert membership.outlook is Outlook.OVER


def test_a_connection_that_an_incarnation_has_replaced_does_not_undo_its_goodbye():
    membership = Membership(CHIEF, [CHIEF])
    membership.join(CHIEF, "start")
    membership.join(CHIEF, "start")
    membership.leave(CHIEF, "start")
    for _ in range(2):
        membership.disconnect(CHIEF, "start")
    assert membership.outlook is Outlook.OVER


def test_an_incarnation_that_is_lost_after_another_has_left_is_lost():
    membership = Membership(CHIEF, [CHIEF])
    membership.join(CHIEF, "first")
    membership.join(CHIEF, "second")
    membership.leave(CHIEF, "first")
    membership.disconnect(CHIEF, "second")
    assert membership.outlook is Outlook.ABSENT


def test_the_strategies_of_a_process_are_numbered():
    membership = Membership(CHIEF, [CHIEF, FIRST])
    assert [membership.join(CHIEF, name) for name in ("p.1", "p.2", "p.1", "p.3")] == [0, 1, 0, 2]
    assert membership.join(FIRST, "q.1") == 0
    membership.leave(CHIEF, "p.2")
    assert membership.join(CHIEF, "p.4") == 3, "one that has left has taken its number with it"
    membership.disconnect(CHIEF, "p.3")
    assert membership.join(CHIEF, "p.5") == 2, "one that was lost is followed by the next one"


def test_a_process_that_was_started_again_begins_with_the_first_model():
    membership = Membership(CHIEF, [CHIEF])
    assert [membership.join(CHIEF, name) for name in ("p.1", "p.2")] == [0, 1]
    assert [membership.join(CHIEF, name) for name in ("q.1", "q.2")] == [0, 1]
    for incarnation in ("p.1", "p.2"):
        membership.disconnect(CHIEF, incarnation)
    assert membership.join(CHIEF, "q.3") == 2


def test_workers_that_are_not_known_may_join_and_are_not_waited_for():
    membership = Membership(FIRST, [FIRST], takes_more=True)
    membership.join(FIRST, "one start")
    membership.join(SECOND, "one start")
    assert membership.joined() == (FIRST, SECOND)
    membership.leave(FIRST, "one start")
    assert membership.outlook is Outlook.GOING_ON
    membership.leave(SECOND, "one start")
    assert membership.outlook is Outlook.OVER


OLD, NEW = "0001.one.0", "0002.two.0"


def test_what_has_expired_is_refused_and_its_next_generation_is_not():
    membership = Membership(CHIEF, [CHIEF, FIRST])
    membership.join(FIRST, OLD)
    membership.expire(OLD)
    membership.disconnect(FIRST, OLD)
    assert membership.joined() == ()
    with pytest.raises(UnavailableError, match="what it still sends is refused"):
        membership.join(FIRST, OLD)
    assert membership.join(FIRST, "0001.one.1") == 0, "it goes on with the same model"


def test_the_next_generation_of_a_strategy_replaces_the_one_before():
    """The ps has not noticed yet that the connection of the one before is dead."""
    membership = Membership(CHIEF, [CHIEF, FIRST])
    membership.join(FIRST, OLD)
    assert membership.join(FIRST, "0001.other.0") == 1, "another strategy of the process"
    assert membership.join(FIRST, "0001.one.1") == 0
    assert membership.replaced(FIRST, "0001.one.1") == [OLD]
    membership.disconnect(FIRST, OLD)
    assert membership.joined() == (FIRST,)
    assert membership.join(FIRST, "0001.third.0") == 2, "the model of the one before is in use"


def test_of_two_processes_of_one_task_the_newer_one_takes_part():
    membership = Membership(CHIEF, [CHIEF, FIRST])
    membership.join(FIRST, OLD)
    membership.join(FIRST, NEW)
    assert membership.replaced(FIRST, NEW) == [OLD]
    membership.disconnect(FIRST, OLD)
    for incarnation in (OLD, "0001.one.1"):
        with pytest.raises((UnavailableError, RefusedError)):
            membership.join(FIRST, incarnation)
    with pytest.raises(RefusedError, match="another process that is worker:0 was started after this one"):
        membership.join(FIRST, "0001.one.1")
    assert membership.joined() == (FIRST,)


def test_a_process_with_a_slow_clock_takes_the_place_of_one_that_is_gone():
    membership = Membership(CHIEF, [CHIEF, FIRST])
    membership.join(FIRST, NEW)
    membership.disconnect(FIRST, NEW)
    assert membership.join(FIRST, OLD) == 0


def test_company_is_waited_for_and_not_once_stopped():
    membership = play("")
    assert not membership.await_company(0.0)
    membership.join(CHIEF, "one start")
    assert membership.await_company(0.0)
    membership.stop()
    assert not membership.await_company(60.0)
