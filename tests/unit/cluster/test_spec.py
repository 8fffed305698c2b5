"""The cluster description (K01 to K03), and the old job name ``master``."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from paramserver.cluster import ClusterSpec, Role, TaskId
from paramserver.errors import ConfigError

MIXED: dict[str, Any] = {"worker": ["w0:1", "w1:1"], "ps": {2: "p2:1", 0: "p0:1"}, "evaluator": []}
CLUSTER_DEF = SimpleNamespace(
    job=[
        SimpleNamespace(name="worker", tasks={0: "w0:1", 1: "w1:1"}),
        SimpleNamespace(name="ps", tasks={0: "p0:1", 2: "p2:1"}),
        SimpleNamespace(name="evaluator", tasks={}),
    ]
)


@pytest.mark.parametrize(
    "cluster",
    [
        pytest.param(MIXED, id="K01-dict"),
        pytest.param({**MIXED, "worker": ("w0:1", "w1:1")}, id="K01-tuple"),
        pytest.param({**MIXED, "ps": {"2": "p2:1", "0": "p0:1"}}, id="K01-string-keys"),
        pytest.param({**MIXED, "worker": {1: "w1:1", 0: "w0:1"}}, id="K02-dense-dict"),
        pytest.param({Role.WORKER: ["w0:1", "w1:1"], Role.PS: MIXED["ps"], Role.EVALUATOR: []}, id="K01-roles"),
        pytest.param(CLUSTER_DEF, id="K01-ClusterDef"),
        pytest.param(ClusterSpec(MIXED), id="K01-ClusterSpec"),
    ],
)
def test_every_form_describes_the_same_cluster(cluster: Any) -> None:
    """K01, K02: as_dict gives lists where indices are dense, dicts where not, {} for a job without tasks."""
    spec = ClusterSpec(cluster)
    assert spec.as_dict() == {"worker": ["w0:1", "w1:1"], "ps": {0: "p0:1", 2: "p2:1"}, "evaluator": {}}
    assert spec == ClusterSpec(MIXED)
    assert hash(spec) == hash(ClusterSpec(MIXED))
    assert {type(job) for job in spec.jobs} == {str}


@pytest.mark.parametrize(
    ("cluster", "error", "match"),
    [
        pytest.param(["w0:1"], TypeError, r"expected a dict.*got \['w0:1'\] of type list", id="K01-list"),
        pytest.param(None, TypeError, "got None of type NoneType", id="K01-None"),
        pytest.param({"worker": "w0:1"}, TypeError, "tasks of job 'worker'.*of type str", id="K01-tasks-str"),
        pytest.param({"worker": 1}, TypeError, "tasks of job 'worker'.*of type int", id="K01-tasks-int"),
        pytest.param({1: ["w0:1"]}, TypeError, "job name.*got 1 of type int", id="K01-job-int"),
        pytest.param({"worker": [1]}, TypeError, "address in job 'worker'.*got 1", id="K01-address-int"),
        pytest.param({"worker": {0: None}}, TypeError, "address in job 'worker'.*None", id="K01-address-None"),
        pytest.param({"worker": {1.5: "w:1"}}, TypeError, "task index.*got 1.5", id="K01-index-float"),
        pytest.param({"worker": {True: "w:1"}}, TypeError, "task index.*got True", id="K01-index-bool"),
        pytest.param({"worker": {"one": "w:1"}}, ConfigError, "task index.*got 'one'", id="K01-index-word"),
        pytest.param({"worker": {-1: "w:1"}}, ConfigError, "task index.*got -1", id="K01-index-negative"),
        pytest.param({"worker": {"1": "a", 1: "b"}}, ConfigError, r"an index twice: \[1, 1\]", id="K01-twice"),
    ],
)
def test_what_is_no_cluster_is_refused(cluster: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ClusterSpec(cluster)


def test_queries() -> None:
    """K02: jobs, num_tasks, sorted task_indices, task_address, and job_tasks with None for holes."""
    spec = ClusterSpec(MIXED)
    assert spec.jobs == ["worker", "ps", "evaluator"]
    assert [spec.num_tasks(job) for job in spec.jobs] == [2, 2, 0]
    assert spec.task_indices("ps") == [0, 2]
    assert spec.task_address("ps", 2) == "p2:1"
    assert [spec.job_tasks(job) for job in spec.jobs] == [["w0:1", "w1:1"], ["p0:1", None, "p2:1"], []]


def test_tasks_and_address_speak_in_task_ids() -> None:
    spec = ClusterSpec(MIXED)
    assert spec.tasks(Role.PS) == [TaskId(Role.PS, 0), TaskId(Role.PS, 2)]
    assert spec.tasks(Role.CHIEF) == spec.tasks(Role.EVALUATOR) == []
    assert spec.address(TaskId(Role.PS, 2)) == "p2:1"


@pytest.mark.parametrize(("cluster", "truth"), [({}, False), ({"worker": []}, True), (MIXED, True)])
def test_only_a_cluster_without_jobs_is_falsy(cluster: Any, truth: bool) -> None:
    """K02: empty -> falsy."""
    assert bool(ClusterSpec(cluster)) is truth


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda spec: spec.num_tasks("workers"), id="num_tasks"),
        pytest.param(lambda spec: spec.task_indices("workers"), id="task_indices"),
        pytest.param(lambda spec: spec.task_address("workers", 0), id="task_address"),
        pytest.param(lambda spec: spec.job_tasks("workers"), id="job_tasks"),
    ],
)
def test_unknown_job_names_the_known_and_the_nearest(ask: Any) -> None:
    """K03: no such job."""
    known = "expected one of 'worker', 'ps', 'evaluator'"
    match = f"no such job in the cluster: {known}, got 'workers'; did you mean 'worker'"
    with pytest.raises(ConfigError, match=match):
        ask(ClusterSpec(MIXED))


def test_unknown_index_names_the_known() -> None:
    """K03: no task with that index, be it a hole or beyond the end."""
    spec = ClusterSpec(MIXED)
    with pytest.raises(ConfigError, match="no task with index 3 in job 'ps': its indices are 0, 2"):
        spec.task_address("ps", 3)
    with pytest.raises(ConfigError, match="no task with index 1 in job 'ps': its indices are 0, 2"):
        spec.address(TaskId(Role.PS, 1))
    with pytest.raises(ConfigError, match=r"no such job in the cluster.*'chief'"):
        spec.address(TaskId(Role.CHIEF, 0))


def test_equality_is_by_content_and_repr_sorts_jobs() -> None:
    """K03: the order of jobs does not matter; repr lists them sorted."""
    one, other = ClusterSpec({"ps": ["a"], "chief": ["b"]}), ClusterSpec({"chief": ["b"], "ps": ["a"]})
    assert one == other
    assert repr(one) == repr(other) == "ClusterSpec({'chief': ['b'], 'ps': ['a']})"
    assert one != ClusterSpec({"ps": ["a"], "chief": ["c"]})
    assert one != {"ps": ["a"], "chief": ["b"]}


def test_nothing_outside_changes_a_spec() -> None:
    """F01: neither the dict it was made of nor the dict it gives away; copies are equal."""
    cluster = {"worker": ["w0:1"], "ps": {"1": "p1:1"}}
    spec = ClusterSpec(cluster)  # type: ignore[arg-type]
    cluster["worker"].append("w1:1")  # type: ignore[attr-defined]
    spec.as_dict()["ps"][0] = "p0:1"
    spec.job_tasks("worker").append("w2:1")
    spec.jobs.append("chief")
    assert spec.as_dict() == {"worker": ["w0:1"], "ps": {1: "p1:1"}}
    assert copy.deepcopy(spec) == spec
    with pytest.raises(AttributeError):
        spec.jobs = []  # type: ignore[misc]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ClusterSpec({"master": ["m:1"], "ps": ["p:1"]}).task_address("chief", 0), id="cluster"),
        pytest.param(lambda: ClusterSpec({"chief": ["m:1"]}).task_address("master", 0), id="question"),
    ],
)
def test_master_is_chief_with_one_warning(make: Any) -> None:
    """C07, G12, T06 (decision): ``master`` is read as ``chief``; the warning points at the caller's line."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert make() == "m:1"
    assert [(w.category, w.filename) for w in seen] == [(DeprecationWarning, __file__)]


@pytest.mark.filterwarnings("ignore:the job name 'master'")
def test_master_beside_chief_is_refused() -> None:
    """C07, G12, T06 (decision): both in one cluster is a ValueError."""
    for cluster in ({"master": ["m:1"], "chief": ["c:1"]}, {"chief": ["c:1"], "master": ["m:1"]}):
        with pytest.raises(ConfigError, match="job 'chief' is given twice"):
            ClusterSpec(cluster)
