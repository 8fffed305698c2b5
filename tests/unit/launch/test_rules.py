"""What the end of one task means for the others."""

from __future__ import annotations

from signal import SIGINT, SIGKILL, SIGTERM

import pytest

from paramserver.cluster.task import Role, TaskId
from paramserver.launch.rules import AFTER_FAILURE, KILL_AFTER, Ending, Rules

PS = TaskId(Role.PS, 0)
CHIEF = TaskId(Role.CHIEF, 0)
WORKER = TaskId(Role.WORKER, 0)
EVALUATOR = TaskId(Role.EVALUATOR, 0)
ALL = (PS, CHIEF, WORKER, EVALUATOR)
GRACE = 10.0
WELL = Ending(0)


@pytest.fixture
def rules() -> Rules:
    return Rules(ALL, GRACE)


@pytest.mark.parametrize("task", [CHIEF, PS])
def test_a_failed_chief_or_ps_ends_all_tasks(rules: Rules, task: TaskId) -> None:
    rules.ended(task, Ending(3), 0.0)
    assert set(rules.take_due(0.0)) == {(other, SIGTERM) for other in ALL if other != task}
    assert rules.summary == f"error: {task} exited with code 3; the run was stopped"


@pytest.mark.parametrize("task", [WORKER, EVALUATOR])
def test_a_failed_worker_or_evaluator_disturbs_nobody(rules: Rules, task: TaskId) -> None:
    rules.ended(task, Ending(137, SIGKILL), 0.0)
    assert rules.next_due() is None
    assert rules.exit_code == 137
    assert rules.summary == f"error: {task} was killed by SIGKILL (code 137)"


def test_the_exit_code_is_the_first_failures(rules: Rules) -> None:
    rules.ended(WORKER, Ending(4), 0.0)
    rules.ended(CHIEF, Ending(5), 1.0)
    assert rules.exit_code == 4


def test_a_task_that_was_told_to_end_has_not_failed(rules: Rules) -> None:
    rules.ended(CHIEF, Ending(5), 0.0)
    rules.take_due(0.0)
    rules.ended(WORKER, Ending(143, SIGTERM), 0.1)
    assert [task for task, _ in rules.failures] == [CHIEF]


def test_ps_tasks_get_the_grace_once_nobody_trains(rules: Rules) -> None:
    rules.ended(CHIEF, WELL, 0.0)
    assert rules.next_due() is None
    rules.ended(WORKER, WELL, 5.0)
    assert rules.next_due() == 5.0 + GRACE
    rules.ended(EVALUATOR, WELL, 7.0)
    assert rules.next_due() == 5.0 + GRACE
    assert rules.take_due(15.0) == [(PS, SIGTERM)]
    assert rules.exit_code == 0


@pytest.mark.parametrize("grace", [GRACE, 0.1])
def test_ps_tasks_do_not_wait_long_for_a_worker_that_has_failed(grace: float) -> None:
    rules = Rules(ALL, grace)
    rules.ended(WORKER, Ending(1), 0.0)
    assert rules.next_due() is None
    rules.ended(CHIEF, WELL, 5.0)
    assert rules.next_due() == 5.0 + min(grace, AFTER_FAILURE)


def test_a_failed_evaluator_does_not_hurry_ps_tasks(rules: Rules) -> None:
    for task, ending in ((EVALUATOR, Ending(1)), (WORKER, WELL), (CHIEF, WELL)):
        rules.ended(task, ending, 0.0)
    assert rules.next_due() == GRACE


def test_a_ps_that_fails_when_nobody_trains_leaves_the_evaluator_alone(rules: Rules) -> None:
    for task in (CHIEF, WORKER):
        rules.ended(task, WELL, 0.0)
    rules.ended(PS, Ending(1), 1.0)
    assert rules.next_due() is None
    assert rules.exit_code == 1


def test_an_evaluator_gets_the_time_that_it_needs(rules: Rules) -> None:
    for task in (CHIEF, WORKER, PS):
        rules.ended(task, WELL, 0.0)
    assert rules.next_due() is None
    assert rules.running == {EVALUATOR}


def test_a_task_that_does_not_end_is_killed(rules: Rules) -> None:
    rules.interrupted(SIGINT, 0.0)
    assert len(rules.take_due(0.0)) == len(ALL)
    rules.ended(PS, Ending(143, SIGTERM), 0.5)
    assert rules.take_due(KILL_AFTER - 0.1) == []
    assert set(rules.take_due(KILL_AFTER)) == {(task, SIGKILL) for task in (CHIEF, WORKER, EVALUATOR)}
    assert rules.next_due() is None


@pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGTERM, 143)])
def test_an_interrupt_gives_the_exit_code(rules: Rules, number: int, code: int) -> None:
    rules.ended(WORKER, Ending(4), 0.0)
    rules.interrupted(number, 1.0)
    assert rules.exit_code == code


def test_a_second_interrupt_kills_at_once(rules: Rules) -> None:
    rules.interrupted(SIGINT, 0.0)
    rules.take_due(0.0)
    rules.interrupted(SIGINT, 0.5)
    assert set(rules.take_due(0.5)) == {(task, SIGKILL) for task in ALL}


def test_a_failure_while_the_run_is_stopped_does_not_ask_twice(rules: Rules) -> None:
    rules.ended(PS, Ending(1), 0.0)
    rules.take_due(0.0)
    rules.ended(CHIEF, Ending(1), 0.1)
    assert rules.take_due(0.1) == []


def test_what_it_knows_is_shown(rules: Rules) -> None:
    rules.ended(WORKER, Ending(4), 0.0)
    assert repr(rules) == "<Rules running: chief:0, evaluator:0, ps:0; failed: 1; code: 4>"


# --- restarts


@pytest.mark.parametrize("task", ALL)
def test_a_task_that_fails_is_started_again_until_it_has_used_up_its_restarts(task: TaskId) -> None:
    rules = Rules(ALL, GRACE, restarts=2)
    assert [rules.ended(task, Ending(137, SIGKILL), 0.0) for _ in range(3)] == [True, True, False]
    assert [failed for failed, _ in rules.failures] == [task]


def test_each_task_has_restarts_of_its_own() -> None:
    rules = Rules(ALL, GRACE, restarts=1)
    assert all(rules.ended(task, Ending(1), 0.0) for task in ALL)
    assert (rules.running, rules.exit_code) == (set(ALL), 0)


def test_who_ends_well_or_is_told_to_end_is_not_started_again() -> None:
    rules = Rules(ALL, GRACE, restarts=1)
    assert not rules.ended(WORKER, WELL, 0.0)
    rules.interrupted(SIGINT, 0.0)
    rules.take_due(0.0)
    assert not any(rules.ended(task, Ending(143, SIGTERM), 1.0) for task in (PS, CHIEF, EVALUATOR))


def test_a_ps_is_not_started_again_when_the_chief_has_finished() -> None:
    """What it held is lost, and nobody would bring it back; a late worker would wait for that."""
    rules = Rules(ALL, GRACE, restarts=1)
    rules.ended(CHIEF, WELL, 0)
    assert not rules.ended(PS, Ending(137, 9), 1)
    assert rules.ended(WORKER, Ending(137, 9), 1) is False  # nor anybody, because the run is stopped
