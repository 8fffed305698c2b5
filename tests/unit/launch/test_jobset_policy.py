"""What the end of a pod means for its Job and its JobSet."""

from __future__ import annotations

from dataclasses import replace
from signal import SIGTERM

import pytest

from paramserver.cluster.jobset import Layout
from paramserver.cluster.task import Role, TaskId
from paramserver.launch.jobsets.jobset import ExitRule, FailureRule, JobSet, ReplicatedJob
from paramserver.launch.jobsets.policy import JobSetLifecycle
from paramserver.launch.lifecycle import FIRST_PAUSE, Ending, Limits

PS, CHIEF, WORKER, EVALUATOR = (TaskId(role, 0) for role in (Role.PS, Role.CHIEF, Role.WORKER, Role.EVALUATOR))
WELL, FAILED, LOST = Ending(0), Ending(3), Ending(75)
LIMITS = Limits(grace=10.0, shutdown_timeout=30.0, restarts=1)
IGNORE = (ExitRule(action="Ignore", codes=frozenset({75, 143})),)


def job(role: Role, layout: Layout = Layout(1), limit: int = 1) -> ReplicatedJob:  # noqa: B008  # it is immutable
    return ReplicatedJob(
        name=role.value, role=role, layout=layout, command=("true",), backoff_limit=limit, exit_rules=IGNORE
    )


def jobset(*jobs: ReplicatedJob, restarts: int | None = 0, rules: tuple[FailureRule, ...] = ()) -> JobSet:
    return JobSet(
        name="train",
        subdomain="train",
        jobs=jobs or (job(Role.PS), job(Role.CHIEF), job(Role.WORKER)),
        success_targets=frozenset({"chief"}),
        max_restarts=restarts,
        rules=rules,
    )


def lifecycle(*jobs: ReplicatedJob, restarts: int | None = 0, rules: tuple[FailureRule, ...] = ()) -> JobSetLifecycle:
    return JobSetLifecycle(jobset(*jobs, restarts=restarts, rules=rules), LIMITS)


def fails_for_good(state: JobSetLifecycle, task: TaskId) -> None:
    assert state.ended(task, FAILED, 0.0) == FIRST_PAUSE
    assert state.take_starts(FIRST_PAUSE) == [task]
    assert state.ended(task, FAILED, 1.0) is None


def test_the_success_of_the_chief_stops_the_others_and_is_the_success_of_all() -> None:
    state = lifecycle()
    assert state.ended(CHIEF, WELL, 0.0) is None
    assert state.has_succeeded
    assert state.take_due(0.0) == [(WORKER, SIGTERM)]
    assert state.reason_to_leave(WORKER) == "the JobSet has succeeded; stopping worker:0"
    state.ended(WORKER, Ending(143), 1.0)
    assert state.take_due(10.9) == []
    assert state.take_due(11.0) == [(PS, SIGTERM)]
    assert state.ended(PS, Ending(143), 12.0) is None
    assert (state.running, state.exit_code, state.summary) == (set(), 0, "")


def test_a_task_that_fails_after_the_success_is_not_started_again() -> None:
    state = lifecycle()
    state.ended(CHIEF, WELL, 0.0)
    assert state.ended(WORKER, FAILED, 0.0) is None
    assert state.exit_code == 0


def test_a_task_that_waits_for_its_restart_when_all_have_succeeded_is_not_waited_for() -> None:
    state = lifecycle()
    state.ended(WORKER, FAILED, 0.0)
    state.ended(CHIEF, WELL, 0.0)
    assert state.running == {PS}
    assert state.take_starts(100.0) == []


def test_with_all_jobs_as_targets_the_chief_alone_is_no_success() -> None:
    state = JobSetLifecycle(replace(jobset(), success_targets=frozenset()), LIMITS)
    state.ended(CHIEF, WELL, 0.0)
    assert not state.has_succeeded
    state.ended(WORKER, WELL, 0.0)
    state.ended(PS, WELL, 0.0)
    assert state.has_succeeded


def test_any_job_is_enough_where_the_policy_says_so() -> None:
    state = JobSetLifecycle(replace(jobset(), success_targets=frozenset(), success_operator="Any"), LIMITS)
    state.ended(WORKER, WELL, 0.0)
    assert state.has_succeeded


def test_a_job_is_complete_with_all_its_pods() -> None:
    state = JobSetLifecycle(
        replace(jobset(job(Role.PS), job(Role.WORKER, Layout(1, 2))), success_targets=frozenset({"worker"})),
        LIMITS,
    )
    state.ended(WORKER, WELL, 0.0)
    assert not state.has_succeeded
    state.ended(TaskId(Role.WORKER, 1), WELL, 0.0)
    assert state.has_succeeded


@pytest.mark.parametrize("task", [PS, CHIEF, WORKER])
def test_a_pod_that_fails_is_made_anew_alone_until_its_job_has_failed_too_often(task: TaskId) -> None:
    state = lifecycle()
    assert state.ended(task, FAILED, 0.0) == FIRST_PAUSE
    assert state.count(task) == "its Job has failed 1 times, limit 1"
    assert state.take_due(100.0) == []
    assert state.take_starts(FIRST_PAUSE) == [task]
    assert state.ended(task, FAILED, 1.0) is None
    assert state.remarks == [
        f"Job train-{task.role}-0 has failed (BackoffLimitExceeded); the JobSet fails after 0 restarts (maxRestarts)"
    ]
    assert state.is_stopping
    assert state.exit_code == 3
    assert state.summary == f"error: {task} exited with code 3; the run was stopped"


def test_an_exit_code_that_is_ignored_does_not_count() -> None:
    state = lifecycle()
    for number in range(5):
        assert state.ended(WORKER, LOST, float(number)) is not None
        assert state.take_starts(100.0 + number) == [WORKER]
    assert state.count(WORKER) == "its Job has failed 0 times, limit 1"
    assert state.ended(WORKER, FAILED, 200.0) is not None


def test_a_rule_may_fail_a_job_at_once_and_a_negated_one_is_for_all_other_codes() -> None:
    rule = ExitRule(action="FailJob", codes=frozenset({3}))
    state = lifecycle(replace(job(Role.PS), exit_rules=(rule,)), job(Role.CHIEF))
    assert state.ended(PS, FAILED, 0.0) is None
    assert "(PodFailurePolicy)" in state.remarks[0]
    negated = ExitRule(action="FailJob", codes=frozenset({3}), is_negated=True)
    assert [negated.matches(code) for code in (3, 4)] == [False, True]


def test_without_a_failure_policy_the_jobset_fails_at_once() -> None:
    state = lifecycle(restarts=None)
    fails_for_good(state, WORKER)
    assert state.remarks == ["Job train-worker-0 has failed (BackoffLimitExceeded); the JobSet fails"]


def test_the_whole_jobset_is_restarted_where_no_rule_matches_until_the_restarts_are_used_up() -> None:
    rules = (FailureRule(action="FailJobSet", targets=frozenset({"ps"})),)
    first = lifecycle(restarts=1, rules=rules)
    fails_for_good(first, WORKER)
    assert (first.is_restarting, first.restarts, first.summary) == (True, 1, "")
    assert first.take_due(1.0) == [(CHIEF, SIGTERM)]
    assert first.ended(CHIEF, Ending(143), 2.0) is None
    assert first.take_due(2.0) == [(PS, SIGTERM)]
    second = JobSetLifecycle(jobset(restarts=1, rules=rules), LIMITS, first.restarts)
    fails_for_good(second, WORKER)
    assert not second.is_restarting
    assert second.exit_code == 3


def test_a_job_that_is_restarted_alone_disturbs_no_other_and_its_failures_are_forgotten() -> None:
    rules = (FailureRule(action="RestartJob", targets=frozenset({"ps", "worker"})),)
    state = lifecycle(job(Role.PS, limit=0), job(Role.CHIEF), job(Role.WORKER, limit=0), restarts=2, rules=rules)
    for task in (PS, WORKER):
        assert state.ended(task, FAILED, 0.0) is not None
        assert state.take_starts(100.0) == [task]
    assert (state.restarts, state.is_stopping) == (2, False)
    assert state.remarks[-1] == "Job train-worker-0 has failed (BackoffLimitExceeded); it is made anew"
    assert state.ended(PS, FAILED, 200.0) is None
    assert "the JobSet fails after 2 restarts" in state.remarks[-1]


def test_restarts_that_do_not_count_are_without_limit() -> None:
    rules = (FailureRule(action="RestartJobAndIgnoreMaxRestarts", reasons=frozenset({"BackoffLimitExceeded"})),)
    state = lifecycle(job(Role.PS, limit=0), job(Role.CHIEF), restarts=0, rules=rules)
    for number in range(3):
        assert state.ended(PS, FAILED, float(number)) is not None
        state.take_starts(100.0)
    assert state.restarts == 0


def test_an_interrupt_stops_all_and_nothing_is_started_again() -> None:
    state = lifecycle()
    state.interrupted(SIGTERM, 0.0)
    assert state.ended(CHIEF, FAILED, 0.0) is None
    assert state.exit_code == 143
