"""What the end of one task means for the others."""

from __future__ import annotations

from signal import SIGINT, SIGKILL, SIGTERM

import pytest

from paramserver.cluster.exit_codes import CONSEQUENCE
from paramserver.cluster.task import Role, TaskId
from paramserver.launch.lifecycle import AFTER_FAILURE, CULPRIT_WAIT, FIRST_PAUSE, Ending, Lifecycle, Limits

PS = TaskId(Role.PS, 0)
CHIEF = TaskId(Role.CHIEF, 0)
WORKER = TaskId(Role.WORKER, 0)
EVALUATOR = TaskId(Role.EVALUATOR, 0)
ALL = (PS, CHIEF, WORKER, EVALUATOR)
GRACE = 10.0
WELL = Ending(0)
LIMITS = Limits(grace=GRACE, shutdown_timeout=30.0)
THREE = (CHIEF, WORKER, EVALUATOR)


@pytest.fixture
def lifecycle() -> Lifecycle:
    return Lifecycle(ALL, LIMITS)


@pytest.mark.parametrize("task", [CHIEF, PS])
def test_a_failed_chief_or_ps_ends_all_tasks_and_ps_tasks_last(lifecycle: Lifecycle, task: TaskId) -> None:
    lifecycle.ended(task, Ending(3), 0.0)
    told = {other for other in THREE if other != task}
    assert set(lifecycle.take_due(0.0)) == {(other, SIGTERM) for other in told}
    for other in told:
        lifecycle.ended(other, Ending(143), 1.0)
    assert lifecycle.take_due(1.0) == ([] if task is PS else [(PS, SIGTERM)])
    assert lifecycle.summary == f"error: {task} exited with code 3; the run was stopped"


def test_ps_tasks_do_not_wait_for_an_evaluator_that_is_told_to_end(lifecycle: Lifecycle) -> None:
    lifecycle.interrupted(SIGTERM, 0.0)
    lifecycle.take_due(0.0)
    lifecycle.ended(CHIEF, Ending(143), 1.0)
    assert lifecycle.take_due(1.0) == []
    lifecycle.ended(WORKER, Ending(143), 2.0)
    assert lifecycle.take_due(2.0) == [(PS, SIGTERM)]


@pytest.mark.parametrize("victim", [PS, CHIEF, WORKER])
def test_the_culprit_is_named_and_not_its_first_victim(lifecycle: Lifecycle, victim: TaskId) -> None:
    culprit = PS if victim is CHIEF else CHIEF
    lifecycle.ended(victim, Ending(CONSEQUENCE), 0.0)
    assert lifecycle.take_due(CULPRIT_WAIT - 0.1) == []
    lifecycle.ended(culprit, Ending(3), 1.0)
    assert lifecycle.exit_code == 3
    assert lifecycle.summary == f"error: {culprit} exited with code 3; the run was stopped"
    assert lifecycle.take_due(1.0)


@pytest.mark.parametrize("task", [PS, CHIEF])
def test_a_consequence_without_a_culprit_ends_the_run_as_well(lifecycle: Lifecycle, task: TaskId) -> None:
    lifecycle.ended(task, Ending(CONSEQUENCE), 0.0)
    assert {number for _, number in lifecycle.take_due(CULPRIT_WAIT)} == {SIGTERM}
    assert lifecycle.exit_code == CONSEQUENCE


@pytest.mark.parametrize("task", [WORKER, EVALUATOR])
def test_a_failed_worker_or_evaluator_disturbs_nobody(lifecycle: Lifecycle, task: TaskId) -> None:
    lifecycle.ended(task, Ending(137, SIGKILL), 0.0)
    assert lifecycle.next_due() is None
    assert lifecycle.exit_code == 137
    assert lifecycle.summary == f"error: {task} was killed by SIGKILL (code 137)"


def test_the_exit_code_is_the_first_failures(lifecycle: Lifecycle) -> None:
    lifecycle.ended(WORKER, Ending(4), 0.0)
    lifecycle.ended(CHIEF, Ending(5), 1.0)
    assert lifecycle.exit_code == 4


def test_a_task_that_was_told_to_end_has_not_failed(lifecycle: Lifecycle) -> None:
    lifecycle.ended(CHIEF, Ending(5), 0.0)
    lifecycle.take_due(0.0)
    lifecycle.ended(WORKER, Ending(143, SIGTERM), 0.1)
    assert [task for task, _ in lifecycle.failures] == [CHIEF]


def test_ps_tasks_get_the_grace_once_nobody_trains(lifecycle: Lifecycle) -> None:
    lifecycle.ended(CHIEF, WELL, 0.0)
    assert lifecycle.next_due() is None
    lifecycle.ended(WORKER, WELL, 5.0)
    assert lifecycle.next_due() == 5.0 + GRACE
    lifecycle.ended(EVALUATOR, WELL, 7.0)
    assert lifecycle.next_due() == 5.0 + GRACE
    assert lifecycle.take_due(15.0) == [(PS, SIGTERM)]
    assert lifecycle.exit_code == 0


@pytest.mark.parametrize("grace", [GRACE, 0.1])
def test_ps_tasks_do_not_wait_long_for_a_worker_that_has_failed(grace: float) -> None:
    lifecycle = Lifecycle(ALL, Limits(grace=grace))
    lifecycle.ended(WORKER, Ending(1), 0.0)
    assert lifecycle.next_due() is None
    lifecycle.ended(CHIEF, WELL, 5.0)
    assert lifecycle.next_due() == 5.0 + min(grace, AFTER_FAILURE)


def test_a_failed_evaluator_does_not_hurry_ps_tasks(lifecycle: Lifecycle) -> None:
    for task, ending in ((EVALUATOR, Ending(1)), (WORKER, WELL), (CHIEF, WELL)):
        lifecycle.ended(task, ending, 0.0)
    assert lifecycle.next_due() == GRACE


def test_a_ps_that_fails_when_nobody_trains_leaves_the_evaluator_alone(lifecycle: Lifecycle) -> None:
    for task in (CHIEF, WORKER):
        lifecycle.ended(task, WELL, 0.0)
    lifecycle.ended(PS, Ending(1), 1.0)
    assert lifecycle.next_due() is None
    assert lifecycle.exit_code == 1


def test_an_evaluator_gets_the_time_that_it_needs(lifecycle: Lifecycle) -> None:
    for task in (CHIEF, WORKER, PS):
        lifecycle.ended(task, WELL, 0.0)
    assert lifecycle.next_due() is None
    assert lifecycle.running == {EVALUATOR}


def test_a_task_that_does_not_end_is_killed(lifecycle: Lifecycle) -> None:
    lifecycle.interrupted(SIGINT, 0.0)
    assert len(lifecycle.take_due(0.0)) == len(THREE)
    lifecycle.ended(EVALUATOR, Ending(143, SIGTERM), 0.5)
    assert lifecycle.take_due(LIMITS.shutdown_timeout - 0.1) == []
    assert set(lifecycle.take_due(LIMITS.shutdown_timeout)) == {(task, SIGKILL) for task in (CHIEF, WORKER)}
    assert lifecycle.next_due() is None


@pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGTERM, 143)])
def test_an_interrupt_gives_the_exit_code(lifecycle: Lifecycle, number: int, code: int) -> None:
    lifecycle.ended(WORKER, Ending(4), 0.0)
    lifecycle.interrupted(number, 1.0)
    assert lifecycle.exit_code == code


def test_a_second_interrupt_kills_at_once(lifecycle: Lifecycle) -> None:
    lifecycle.interrupted(SIGINT, 0.0)
    lifecycle.take_due(0.0)
    lifecycle.interrupted(SIGINT, 0.5)
    assert set(lifecycle.take_due(0.5)) == {(task, SIGKILL) for task in ALL}


def test_a_signal_when_only_ps_tasks_are_left_ends_them(lifecycle: Lifecycle) -> None:
    for task in THREE:
        lifecycle.ended(task, WELL, 0.0)
    lifecycle.interrupted(SIGTERM, 1.0)
    assert lifecycle.take_due(1.0) == [(PS, SIGTERM)]


def test_a_failure_while_the_run_is_stopped_does_not_ask_twice(lifecycle: Lifecycle) -> None:
    lifecycle.ended(PS, Ending(1), 0.0)
    lifecycle.take_due(0.0)
    lifecycle.ended(CHIEF, Ending(1), 0.1)
    assert lifecycle.take_due(0.1) == []


def test_what_it_knows_is_shown(lifecycle: Lifecycle) -> None:
    lifecycle.ended(WORKER, Ending(4), 0.0)
    assert repr(lifecycle) == "<Lifecycle running: chief:0, evaluator:0, ps:0; failed: 1; code: 4>"


# --- restarts


@pytest.mark.parametrize("task", ALL)
def test_a_task_that_fails_is_started_again_until_it_has_used_up_its_restarts(task: TaskId) -> None:
    lifecycle = Lifecycle(ALL, Limits(restarts=2))
    for number in (1, 2):
        assert lifecycle.ended(task, Ending(137, SIGKILL), 0.0) == FIRST_PAUSE * number
        assert (lifecycle.take_starts(0.0), lifecycle.next_due()) == ([], FIRST_PAUSE * number)
        assert lifecycle.take_starts(FIRST_PAUSE * number) == [task]
    assert lifecycle.ended(task, Ending(137, SIGKILL), 0.0) is None
    assert [failed for failed, _ in lifecycle.failures] == [task]


def test_a_failure_before_the_restart_window_does_not_count() -> None:
    lifecycle = Lifecycle(ALL, Limits(restarts=1, restart_window=60.0))
    assert lifecycle.ended(WORKER, Ending(1), 0.0) == FIRST_PAUSE
    assert lifecycle.ended(WORKER, Ending(1), 61.0) == FIRST_PAUSE
    assert lifecycle.ended(WORKER, Ending(1), 62.0) is None


def test_a_task_that_waits_for_its_restart_is_not_started_when_the_run_is_stopped() -> None:
    lifecycle = Lifecycle(ALL, Limits(restarts=1))
    lifecycle.ended(WORKER, Ending(1), 0.0)
    lifecycle.interrupted(SIGINT, 0.1)
    assert lifecycle.take_starts(9.0) == []
    assert WORKER not in lifecycle.running


def test_each_task_has_restarts_of_its_own() -> None:
    lifecycle = Lifecycle(ALL, Limits(restarts=1))
    assert all(lifecycle.ended(task, Ending(1), 0.0) is not None for task in ALL)
    assert (lifecycle.running, lifecycle.exit_code) == (set(ALL), 0)


def test_who_ends_well_or_is_told_to_end_is_not_started_again() -> None:
    lifecycle = Lifecycle(ALL, Limits(restarts=1))
    assert lifecycle.ended(WORKER, WELL, 0.0) is None
    lifecycle.interrupted(SIGINT, 0.0)
    lifecycle.take_due(0.0)
    assert all(lifecycle.ended(task, Ending(143, SIGTERM), 1.0) is None for task in (PS, CHIEF, EVALUATOR))


def test_a_ps_is_not_started_again_when_the_chief_has_finished() -> None:
    """What it held is lost, and nobody would bring it back; a late worker would wait for that."""
    lifecycle = Lifecycle(ALL, Limits(restarts=1))
    lifecycle.ended(CHIEF, WELL, 0)
    assert lifecycle.ended(PS, Ending(137, 9), 1) is None
    assert lifecycle.ended(WORKER, Ending(137, 9), 1) is None  # nor anybody, because the run is stopped


def test_tasks_that_were_all_told_at_once_cannot_fail(lifecycle: Lifecycle) -> None:
    lifecycle.ended(CHIEF, Ending(3), 0.0)
    lifecycle.told_all()
    lifecycle.ended(PS, Ending(143), 1.0)
    assert lifecycle.culprit == (CHIEF, Ending(3))
    assert lifecycle.summary == "error: chief:0 exited with code 3; the run was stopped"
