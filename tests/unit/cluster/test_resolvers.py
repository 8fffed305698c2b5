"""Resolvers that are told (L08 to L09), that join others (L10 to L12), and one's own; L13."""

from __future__ import annotations

from typing import Any

import pytest

from paramserver.cluster import (
    ClusterResolver,
    ClusterSpec,
    DuplicateTaskError,
    SimpleClusterResolver,
    TFConfigClusterResolver,
    UnionClusterResolver,
    format_master_url,
)
from paramserver.errors import ConfigError

CLUSTER: dict[str, Any] = {"chief": ["c0:1"], "worker": ["w0:1", "w1:1"], "ps": ["p0:1"]}

# --- SimpleClusterResolver


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"cluster_spec": CLUSTER}, "cluster_spec: expected ClusterSpec, got .* of type dict"),
        ({"cluster_spec": ClusterSpec({}), "master": 1}, "master: expected str, got 1 of type int"),
    ],
)
def test_simple_checks_types(arguments: dict[str, Any], match: str) -> None:
    """L08."""
    with pytest.raises(TypeError, match=match):
        SimpleClusterResolver(**arguments)


def test_simple_answers_what_it_was_given() -> None:
    """L08, L09: accelerators are the same for every task; type, id and rpc_layer can be set."""
    spec, accelerators = ClusterSpec(CLUSTER), {"GPU": 2, "CPU": 1}
    resolver = SimpleClusterResolver(spec, "m:1", "worker", 0, "here", accelerators, "grpc")
    assert resolver.cluster_spec() is spec
    assert (resolver.task_type, resolver.task_id, resolver.environment) == ("worker", 0, "here")
    assert resolver.num_accelerators() == resolver.num_accelerators("ps", 9) == accelerators
    resolver.task_type, resolver.task_id, resolver.rpc_layer = "ps", 1, "http"
    assert (resolver.task_type, resolver.task_id, resolver.rpc_layer) == ("ps", 1, "http")
    assert resolver.master() == "http://m:1"


def test_simple_defaults() -> None:
    """L08: no accelerators is {}."""
    resolver = SimpleClusterResolver(ClusterSpec({}))
    assert (resolver.task_type, resolver.task_id, resolver.rpc_layer) == (None, None, None)
    assert resolver.master() == resolver.environment == ""
    assert resolver.num_accelerators() == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "grpc://m:1"),
        ({"task_type": "worker", "task_id": 0}, "grpc://w0:1"),
        ({"task_type": "worker"}, "grpc://m:1"),
        ({"task_id": 0}, "grpc://m:1"),
        ({"rpc_layer": "http"}, "http://m:1"),
        ({"task_type": "ps", "task_id": 0, "rpc_layer": "http"}, "http://p0:1"),
    ],
)
def test_simple_master(arguments: dict[str, Any], expected: str) -> None:
    """L09: only type and id together name a task; the rpc_layer is the argument's or the constructor's."""
    resolver = SimpleClusterResolver(ClusterSpec(CLUSTER), "m:1", "worker", 1, rpc_layer="grpc")
    assert resolver.master(**arguments) == expected


# --- UnionClusterResolver


def simple(cluster: Any, **arguments: Any) -> SimpleClusterResolver:
    return SimpleClusterResolver(ClusterSpec(cluster), **arguments)


@pytest.mark.parametrize(
    ("resolvers", "keywords", "error", "match"),
    [
        ([], {}, ConfigError, "at least one cluster resolver"),
        ([simple({}), ClusterSpec({})], {}, TypeError, "expected ClusterResolver, got ClusterSpec"),
        ([simple({})], {"master": "m"}, ConfigError, r"unexpected \['master'\]: expected task_type, task_id"),
    ],
)
def test_union_checks_arguments(resolvers: Any, keywords: Any, error: type[Exception], match: str) -> None:
    """L10."""
    with pytest.raises(error, match=match):
        UnionClusterResolver(*resolvers, **keywords)


@pytest.mark.parametrize(
    ("clusters", "merged"),
    [
        pytest.param([{"ps": ["a"]}, {"worker": ["b"]}], {"ps": ["a"], "worker": ["b"]}, id="other-jobs"),
        pytest.param([{"ps": ["b", "a"]}, {"ps": ["c"]}, {"ps": ["a"]}], {"ps": ["b", "a", "c", "a"]}, id="lists"),
        pytest.param([{"ps": ["a"]}, {"ps": {2: "c", 3: "d"}}], {"ps": {0: "a", 2: "c", 3: "d"}}, id="list-dict"),
        pytest.param([{"ps": {1: "b"}}, {"ps": ["a"]}], {"ps": ["a", "b"]}, id="dict-list"),
        pytest.param([{"ps": {1: "b"}}, {"ps": {3: "d"}}], {"ps": {1: "b", 3: "d"}}, id="dicts"),
        pytest.param([{"ps": []}, {"ps": ["a"]}, {"ps": ["b"]}], {"ps": ["a", "b"]}, id="no-tasks-and-lists"),
        pytest.param([{"ps": []}], {"ps": []}, id="no-tasks"),
    ],
)
def test_union_merges_clusters(clusters: list[Any], merged: Any) -> None:
    """L11."""
    assert UnionClusterResolver(*map(simple, clusters)).cluster_spec() == ClusterSpec(merged)


@pytest.mark.parametrize(
    ("clusters", "indices"),
    [([{"ps": {1: "a", 2: "b"}}, {"ps": {2: "c"}}], "2"), ([{"ps": ["a", "b"]}, {"ps": {1: "c"}}], "1")],
)
def test_union_refuses_a_task_twice(clusters: list[Any], indices: str) -> None:
    """L11: KeyError, and one of ours too; its text is not quoted as a KeyError's would be."""
    with pytest.raises(KeyError, match=rf"^duplicate keys: .*'ps' the indices \[{indices}\]$") as caught:
        UnionClusterResolver(*map(simple, clusters)).cluster_spec()
    assert caught.type is DuplicateTaskError
    assert issubclass(DuplicateTaskError, ConfigError)


def first_and_second(**keywords: Any) -> UnionClusterResolver:
    first = simple(
        {"ps": ["p0", "p1"]},
        master="m",
        task_type="ps",
        task_id=1,
        environment="here",
        num_accelerators={"GPU": 1},
        rpc_layer="grpc",
    )
    return UnionClusterResolver(first, simple({"worker": ["w0"]}, master="n", task_type="worker"), **keywords)


def identity(resolver: ClusterResolver) -> tuple[str | None, int | None, str | None]:
    return resolver.task_type, resolver.task_id, resolver.rpc_layer


def test_union_asks_the_first_resolver() -> None:
    """L12: for everything but the cluster; master of a named task looks in the merged cluster."""
    union = first_and_second()
    assert identity(union) == ("ps", 1, "grpc")
    assert (union.environment, union.num_accelerators("x", 5)) == ("here", {"GPU": 1})
    assert (union.master(), union.master("worker", 0)) == ("grpc://m", "grpc://w0")
    assert (union.master("worker"), union.master(rpc_layer="a")) == ("grpc://m", "a://m")


def test_union_overrides() -> None:
    """L12 (decision): by constructor and by setter, task_id 0 too."""
    union = first_and_second(task_type="worker", task_id=0, rpc_layer="http")
    assert identity(union) == ("worker", 0, "http")
    assert (union.master(), union.master("ps", 0)) == ("http://m", "http://p0")
    union.task_type, union.task_id, union.rpc_layer = "chief", 3, "a"
    assert identity(union) == ("chief", 3, "a")


def test_union_asks_the_first_resolver_for_the_task() -> None:
    """L07, L12: arguments of num_accelerators reach the first resolver; the environment is not asked."""
    counted = {("ps", 0): {"GPU": 1}, ("worker", 1): {"GPU": 2}}
    first = TFConfigClusterResolver("worker", 1, count_devices=lambda job, index: counted[job, index])  # type: ignore[index]
    union = UnionClusterResolver(first, simple({}, num_accelerators={"GPU": 9}))
    assert (union.num_accelerators(), union.num_accelerators("ps", 0)) == ({"GPU": 2}, {"GPU": 1})


@pytest.mark.parametrize(("layer", "url"), [(None, "a:1"), ("", "a:1"), ("grpc", "grpc://a:1")])
def test_format_master_url(layer: str | None, url: str) -> None:
    """L13."""
    assert format_master_url("a:1", layer) == url


def test_a_resolver_of_ones_own_needs_two_methods() -> None:
    class Own(ClusterResolver):
        def cluster_spec(self) -> ClusterSpec:
            return ClusterSpec({})

        def master(self, task_type: Any = None, task_id: Any = None, rpc_layer: Any = None) -> str:
            return "m"

    assert identity(Own()) == (None, None, None)
    assert (Own().num_accelerators(), Own().environment) == ({}, "")
    with pytest.raises(TypeError, match="abstract"):
        ClusterResolver()  # type: ignore[abstract]
