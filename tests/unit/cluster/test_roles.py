"""Checks, counts and ids of tasks (C04 to C12, M01 to M03)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from paramserver.cluster import (
    ClusterSpec,
    TaskId,
    collective_leader,
    coordination_leader,
    find_task,
    id_in_cluster,
    is_chief,
    normalize_cluster_spec,
    validate_cluster,
    worker_count,
)
from paramserver.errors import ConfigError

WORKERS: dict[str, Any] = {"worker": ["w0", "w1", "w2"], "ps": ["p0", "p1"]}
CHIEF: dict[str, Any] = {"chief": ["c0"], **WORKERS}
FULL: dict[str, Any] = {**CHIEF, "evaluator": ["e0"]}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(WORKERS, id="C06-dict"),
        pytest.param(ClusterSpec(WORKERS), id="C06-ClusterSpec"),
        pytest.param(
            SimpleNamespace(job=[SimpleNamespace(name=n, tasks=dict(enumerate(t))) for n, t in WORKERS.items()]),
            id="C06-ClusterDef",
        ),
    ],
)
def test_a_cluster_is_taken_in_every_form(value: Any) -> None:
    """C06: by every function here."""
    assert normalize_cluster_spec(value) == ClusterSpec(WORKERS)
    assert validate_cluster(value, "ps", 1) == find_task(value, "ps", 1) == TaskId.parse("ps:1")
    assert is_chief(value, "worker", 0)
    assert worker_count(value, "worker") == 3
    assert id_in_cluster(value, "worker", 2) == 2
    assert coordination_leader(value) == TaskId.parse("ps:0")
    assert collective_leader(value, "worker", 1) == TaskId.parse("worker:0")


@pytest.mark.parametrize("value", [["w0"], None, "w0"])
def test_what_is_no_cluster_is_refused(value: Any) -> None:
    """C06: a list is a ValueError that says which forms are taken."""
    with pytest.raises(ConfigError, match="should be a dict, a ClusterSpec or a ClusterDef: got"):
        normalize_cluster_spec(value)


@pytest.mark.parametrize(
    ("task_type", "task_id"),
    [
        pytest.param("worker", 0, id="C04-task_id-0"),
        pytest.param("worker", 2, id="C11-last"),
        pytest.param("chief", 0, id="chief"),
        pytest.param("ps", 1, id="C16-ps"),
        pytest.param("evaluator", 0, id="C09-Z15-evaluator-absent"),
        pytest.param("evaluator", 3, id="G11-evaluator-without-bound"),
    ],
)
def test_a_task_of_the_cluster_is_valid(task_type: str, task_id: int) -> None:
    assert str(validate_cluster(CHIEF, task_type, task_id)) == f"{task_type}:{task_id}"


@pytest.mark.parametrize(
    ("cluster", "task_type", "task_id", "match"),
    [
        pytest.param(FULL, None, 0, "must also specify task_type and task_id.*None", id="C04-no-type"),
        pytest.param(FULL, "", 0, "must also specify task_type and task_id.*''", id="C04-empty-type"),
        pytest.param(FULL, "worker", None, "must also specify task_type and task_id", id="C04-no-id"),
        pytest.param({"worker": ["w0"]}, "worker", 0, r"needs to have a 'ps' job.*\['worker'\]", id="C05-no-ps"),
        pytest.param({"worker": ["w0"], "ps": []}, "worker", 0, "needs to have a 'ps' job", id="C05-empty-ps"),
        pytest.param(["w0"], "worker", 0, "should be a dict", id="C06-list"),
        pytest.param(
            {"workers": ["w0"], "ps": ["p0"]},
            "ps",
            0,
            "disallowed task type.*'chief', 'worker', 'ps', 'evaluator', got 'workers'; did you mean",
            id="C07",
        ),
        pytest.param({"pss": ["p0"]}, "ps", 0, "disallowed.*did you mean 'ps'", id="C07-before-C05"),
        pytest.param(FULL, "workers", 0, "unrecognized task_type.*'workers'; did you mean", id="C08"),
        pytest.param(WORKERS, "chief", 0, r"'chief' not found in the cluster.*\['worker', 'ps'\]", id="C09"),
        pytest.param({"worker": [], "ps": ["p"]}, "worker", 0, "'worker' not found", id="C09-empty-job"),
        pytest.param(
            {**WORKERS, "chief": ["a", "b"]},
            "worker",
            0,
            r"at most one chief, got \['a', 'b'\]",
            id="C10-chief",
        ),
        pytest.param({**WORKERS, "evaluator": ["a", "b"]}, "worker", 0, "at most one evaluator", id="C10-evaluator"),
        pytest.param(FULL, "worker", 3, "worker:3.*exceeds the maximum id.*3 worker tasks", id="C11"),
        pytest.param(FULL, "evaluator", 1, "evaluator:1.*exceeds the maximum id", id="C11-evaluator"),
        pytest.param({"ps": {0: "a", 2: "b"}}, "ps", 2, "ps:2.*exceeds the maximum id", id="C11-sparse"),
        pytest.param({"ps": {0: "a", 2: "b"}}, "ps", 1, "no task with index 1.*are 0, 2", id="C11-hole"),
        pytest.param(FULL, "worker", -1, "worker:-1 is not in the cluster", id="C11-negative"),
        pytest.param(WORKERS, "evaluator", -1, "evaluator:-1 is not in the cluster", id="G11-negative"),
    ],
)
def test_a_task_that_cannot_be_is_refused(cluster: Any, task_type: str, task_id: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        validate_cluster(cluster, task_type, task_id)


def test_only_training_needs_ps_tasks() -> None:
    """C05 is the strategy's rule; counting needs no ps."""
    assert find_task({"worker": ["w0"]}, "worker", 0) == TaskId.parse("worker:0")


@pytest.mark.parametrize(
    ("cluster", "task", "expected"),
    [
        (CHIEF, "chief:0", True),
        (FULL, "evaluator:0", True),
        (CHIEF, "evaluator:0", True),
        (WORKERS, "worker:0", True),
        ({**WORKERS, "chief": []}, "worker:0", True),
        (WORKERS, "worker:1", False),
        (CHIEF, "worker:0", False),
        (CHIEF, "ps:0", False),
        (WORKERS, "ps:0", False),
    ],
)
def test_is_chief(cluster: Any, task: str, expected: bool) -> None:
    """C12."""
    assert is_chief(cluster, *TaskId.parse(task)) is expected


@pytest.mark.parametrize(
    ("cluster", "task_type", "count"),
    [
        (CHIEF, "chief", 4),
        (CHIEF, "worker", 4),
        (WORKERS, "worker", 3),
        ({"chief": ["c0"]}, "chief", 1),
        (FULL, "evaluator", 1),
        pytest.param(CHIEF, "evaluator", 1, id="M01-decision-evaluator-absent"),
    ],
)
def test_worker_count(cluster: Any, task_type: str, count: int) -> None:
    """M01: chief and workers are one family; the evaluator counts 1, in the cluster or not."""
    assert worker_count(cluster, task_type) == count


@pytest.mark.parametrize(
    ("cluster", "task", "number"),
    [
        (CHIEF, "chief:0", 0),
        (CHIEF, "worker:0", 1),
        (CHIEF, "worker:2", 3),
        (WORKERS, "worker:2", 2),
        (FULL, "evaluator:0", 0),
        (CHIEF, "evaluator:0", 0),
    ],
)
def test_id_in_cluster(cluster: Any, task: str, number: int) -> None:
    """M02."""
    assert id_in_cluster(cluster, *TaskId.parse(task)) == number


def test_a_ps_is_not_counted_and_has_no_id() -> None:
    """M01, M02: ValueErrors that say who is counted."""
    with pytest.raises(ConfigError, match="unexpected task_type 'ps': expected chief, worker or evaluator"):
        worker_count(FULL, "ps")
    with pytest.raises(ConfigError, match="there is no id for ps:1: expected chief, worker or evaluator"):
        id_in_cluster(FULL, "ps", 1)


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda: worker_count(WORKERS, "chief"), id="M01"),
        pytest.param(lambda: id_in_cluster(WORKERS, "chief", 0), id="M02"),
        pytest.param(lambda: is_chief(WORKERS, "chief", 0), id="C12"),
        pytest.param(lambda: collective_leader(WORKERS, "chief", 0), id="M03"),
    ],
)
def test_every_question_checks_the_task(ask: Any) -> None:
    """C09 holds for counts and ids as well."""
    with pytest.raises(ConfigError, match="'chief' not found in the cluster"):
        ask()


@pytest.mark.parametrize(
    ("cluster", "coordination", "collective"),
    [
        (FULL, "ps:0", "chief:0"),
        (WORKERS, "ps:0", "worker:0"),
        ({"chief": ["c0"], "worker": ["w0"]}, "chief:0", "chief:0"),
        ({"worker": ["w0", "w1"]}, "worker:0", "worker:0"),
    ],
)
def test_leaders(cluster: Any, coordination: str, collective: str) -> None:
    """M03."""
    assert str(coordination_leader(cluster)) == coordination
    assert str(collective_leader(cluster, "worker", 0)) == collective


def test_nobody_leads_a_process_that_is_alone_or_evaluates() -> None:
    """M03: None without a cluster; the evaluator has no collective leader."""
    assert coordination_leader({}) is None
    assert collective_leader({}, None, None) is None
    assert collective_leader(FULL, "evaluator", 0) is None
    with pytest.raises(ConfigError, match="must also specify"):
        collective_leader(FULL, None, None)


def test_a_cluster_may_have_no_leader() -> None:
    """M03: an error, and not a task that does not exist."""
    with pytest.raises(ConfigError, match=r"no leader: expected a chief or worker, got the jobs \['ps'\]"):
        collective_leader({"ps": ["p0"]}, "ps", 0)
    with pytest.raises(ConfigError, match="no leader: expected a ps or chief or worker"):
        coordination_leader({"evaluator": ["e0"]})


def test_master_is_chief_in_every_question() -> None:
    """C07, G12, T06 (decision): as a job and as a task type, with DeprecationWarnings."""
    cluster = {"master": ["m0"], **WORKERS}
    with pytest.warns(DeprecationWarning, match="rename it"):
        assert str(validate_cluster(cluster, "master", 0)) == "chief:0"
    with pytest.warns(DeprecationWarning, match="rename it"):
        assert is_chief(cluster, "worker", 0) is False
    with pytest.warns(DeprecationWarning, match="rename it"):
        assert worker_count(CHIEF, "master") == 4
