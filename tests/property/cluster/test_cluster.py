"""What holds for every cluster: forms that round trip, ids that are a numbering, unions that lose nothing."""

from __future__ import annotations

import itertools
import json
import os
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from paramserver.cluster import (
    ClusterSpec,
    Role,
    SimpleClusterResolver,
    TaskId,
    TFConfigClusterResolver,
    UnionClusterResolver,
    coordination_leader,
    id_in_cluster,
    is_chief,
    validate_cluster,
    worker_count,
)

addresses = st.text(max_size=8)
job_names = st.text(max_size=8).filter(lambda name: name != "master")
dense = st.lists(addresses, max_size=4)
sparse = st.dictionaries(st.integers(0, 20), addresses, max_size=4)
specs = st.dictionaries(job_names, dense | sparse, max_size=4).map(ClusterSpec)


@st.composite
def role_clusters(draw: st.DrawFn) -> ClusterSpec:
    """A cluster that a parameter server strategy takes: trainers, ps tasks, perhaps an evaluator."""
    jobs = {
        "chief": draw(st.lists(addresses, max_size=1)),
        "worker": draw(dense),
        "ps": draw(st.lists(addresses, min_size=1, max_size=3)),
        "evaluator": draw(st.lists(addresses, max_size=1)),
    }
    jobs["worker"] += [] if jobs["chief"] else ["w"]
    return ClusterSpec({job: jobs[job] for job in draw(st.permutations(list(jobs)))})


def trainers(spec: ClusterSpec) -> list[TaskId]:
    return spec.tasks(Role.CHIEF) + spec.tasks(Role.WORKER)


@given(specs, st.data())
def test_every_form_round_trips(spec: ClusterSpec, data: st.DataObject) -> None:
    """K01 to K03, L03: as_dict, repr and TF_CONFIG's JSON, whose keys are text, say the same."""
    assert ClusterSpec(spec.as_dict()) == spec
    assert eval(repr(spec)) == spec  # noqa: S307  # the text is our own repr
    assert hash(ClusterSpec(spec.as_dict())) == hash(spec)
    ports = itertools.count(data.draw(st.integers(1, 60_000)))
    named = ClusterSpec({job: {index: f"host:{next(ports)}" for index in spec.task_indices(job)} for job in spec.jobs})
    with mock.patch.dict(os.environ, {"TF_CONFIG": json.dumps({"cluster": named.as_dict()})}):
        assert TFConfigClusterResolver().cluster_spec() == named


@given(specs)
def test_queries_agree(spec: ClusterSpec) -> None:
    """K02: every question about a job gives the same tasks."""
    for job in spec.jobs:
        indices, tasks = spec.task_indices(job), spec.job_tasks(job)
        assert indices == sorted(indices) == [i for i, address in enumerate(tasks) if address is not None]
        assert [spec.task_address(job, i) for i in indices] == [tasks[i] for i in indices]
        assert spec.num_tasks(job) == len(indices)
        assert isinstance(spec.as_dict()[job], list) == (bool(tasks) and None not in tasks)


@given(role_clusters())
def test_ids_number_those_who_train(spec: ClusterSpec) -> None:
    """M01, M02: id_in_cluster is a bijection of chief and workers onto range(worker_count)."""
    ids = [id_in_cluster(spec, *task) for task in trainers(spec)]
    assert ids == list(range(worker_count(spec, trainers(spec)[-1].role)))


@given(role_clusters())
def test_exactly_one_who_trains_is_chief(spec: ClusterSpec) -> None:
    """C12, M02: and it is number 0."""
    chiefs = [task for task in trainers(spec) if is_chief(spec, *task)]
    assert [id_in_cluster(spec, *task) for task in chiefs] == [0]


@given(role_clusters())
def test_every_task_of_a_valid_cluster_is_valid(spec: ClusterSpec) -> None:
    """C04 to C11: in whatever order the jobs stand; and ps:0 leads (M03)."""
    for task in (task for role in Role for task in spec.tasks(role)):
        assert validate_cluster(spec, *task) == task
    assert coordination_leader(spec) == TaskId(Role.PS, 0)


@given(st.lists(st.dictionaries(st.sampled_from(["ps", "worker"]), dense), min_size=1, max_size=4))
def test_union_of_lists_joins_them_in_order(parts: list[dict[str, list[str]]]) -> None:
    """L11."""
    union = UnionClusterResolver(*(SimpleClusterResolver(ClusterSpec(part)) for part in parts)).cluster_spec()
    for job in union.jobs:
        assert union.job_tasks(job) == [address for part in parts for address in part.get(job, [])]
    assert set(union.jobs) == {job for part in parts for job in part}


@given(st.dictionaries(st.integers(1, 20), addresses), st.data())
def test_union_of_scattered_tasks_is_the_whole(tasks: dict[int, str], data: st.DataObject) -> None:
    """L11: tasks given by index (without a 0, so that no part is a list) come together again."""
    parts: list[dict[int, str]] = [{}, {}, {}]
    for index, address in tasks.items():
        data.draw(st.sampled_from(parts))[index] = address
    union = UnionClusterResolver(*(SimpleClusterResolver(ClusterSpec({"ps": part})) for part in parts))
    assert union.cluster_spec() == ClusterSpec({"ps": tasks})
