"""TF_CONFIG (L01 to L07) and the standard server's reading of it (V05)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from paramserver.cluster import ClusterSpec, SimpleClusterResolver, TFConfigClusterResolver, load_tf_config, server_task
from paramserver.errors import ConfigError

CLUSTER: dict[str, Any] = {"chief": ["c0:1"], "worker": ["w0:1", "w1:1"], "ps": ["p0:1"]}
CONFIG: dict[str, Any] = {"cluster": CLUSTER, "task": {"type": "worker", "index": 1}, "rpc_layer": "grpc"}
SetConfig = Callable[[object], None]


@pytest.fixture
def set_config(monkeypatch: pytest.MonkeyPatch) -> SetConfig:
    """Sets TF_CONFIG to a value as JSON, or to a text as it is."""

    def set_(value: object) -> None:
        monkeypatch.setenv("TF_CONFIG", value if isinstance(value, str) else json.dumps(value))

    monkeypatch.delenv("TF_CONFIG", raising=False)
    return set_


@pytest.mark.parametrize("value", [None, "", "{}"])
def test_no_config_is_a_process_that_is_alone(set_config: SetConfig, value: str | None) -> None:
    """L01, L06."""
    if value is not None:
        set_config(value)
    resolver = TFConfigClusterResolver()
    assert resolver.cluster_spec() == ClusterSpec({})
    assert (resolver.task_type, resolver.task_id, resolver.rpc_layer) == (None, None, None)
    assert resolver.master() == resolver.environment == ""


def test_the_environment_is_read_at_every_access(set_config: SetConfig) -> None:
    """L02."""
    resolver = TFConfigClusterResolver()
    set_config(CONFIG)
    assert (resolver.cluster_spec(), resolver.task_id) == (ClusterSpec(CLUSTER), 1)
    assert resolver.master() == "grpc://w1:1"
    set_config({"cluster": {"ps": ["p0:1", "p1:1"]}, "task": {"type": "ps", "index": 0}})
    assert (resolver.cluster_spec().jobs, resolver.task_type, resolver.task_id) == (["ps"], "ps", 0)
    assert (resolver.rpc_layer, resolver.master()) == (None, "p0:1")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        pytest.param({"type": 123456, "index": "1"}, ("123456", 1), id="L03"),
        pytest.param({"type": "ps", "index": 0}, ("ps", 0), id="L03-zero"),
        pytest.param({"type": "ps"}, ("ps", None), id="L03-no-index"),
        pytest.param({"index": 2}, (None, 2), id="L03-no-type"),
    ],
)
def test_type_is_text_and_index_is_int(set_config: SetConfig, task: Any, expected: object) -> None:
    set_config({"cluster": CLUSTER, "task": task})
    resolver = TFConfigClusterResolver()
    assert (resolver.task_type, resolver.task_id) == expected


def test_constructor_overrides_environment_and_setters_override_both(set_config: SetConfig) -> None:
    """L04, L12 (decision): task_id 0 overrides too; ``environment`` comes from the constructor alone."""
    set_config({**CONFIG, "environment": "elsewhere"})
    resolver = TFConfigClusterResolver("ps", 0, "http", "here")
    assert (resolver.task_type, resolver.task_id, resolver.rpc_layer) == ("ps", 0, "http")
    assert (resolver.environment, TFConfigClusterResolver().environment) == ("here", "")
    assert resolver.master() == "http://p0:1"
    resolver.task_type, resolver.task_id, resolver.rpc_layer = "chief", 0, "tcp"
    assert resolver.master() == "tcp://c0:1"
    resolver.task_type = resolver.task_id = resolver.rpc_layer = None
    assert resolver.master() == "grpc://w1:1"


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        pytest.param(CONFIG, {}, "grpc://w1:1", id="L05-own-address"),
        pytest.param({**CONFIG, "rpc_layer": None}, {}, "w1:1", id="L06-no-layer"),
        pytest.param(CONFIG, {"rpc_layer": ""}, "w1:1", id="L05-empty-layer-overrides"),
        pytest.param(CONFIG, {"task_id": 0}, "grpc://w0:1", id="L05-id-overrides"),
        pytest.param(CONFIG, {"task_type": "ps", "task_id": 0, "rpc_layer": "a"}, "a://p0:1", id="L05-all-override"),
        pytest.param({**CONFIG, "session_master": "x"}, {"task_type": "ps"}, "x", id="L05-session-master"),
        pytest.param({"session_master": "grpc://x"}, {}, "grpc://x", id="L05-session-master-alone"),
        pytest.param({**CONFIG, "cluster": {}}, {}, "", id="L05-no-jobs"),
        pytest.param({**CONFIG, "cluster": {"worker": ["w0:1"]}}, {"task_type": "nonsense"}, "", id="L05-one-task"),
        pytest.param({**CONFIG, "cluster": {"worker": ["w0:1"], "ps": []}}, {}, "", id="L05-one-task-two-jobs"),
        pytest.param({**CONFIG, "cluster": {"chief": ["c:1"], "worker": {"1": "w:1"}}}, {}, "grpc://w:1", id="L05-two"),
    ],
)
def test_master(set_config: SetConfig, config: object, arguments: dict[str, Any], expected: str) -> None:
    """L05: session_master, then nothing for one task at most, then the address of the task."""
    set_config(config)
    assert TFConfigClusterResolver().master(**arguments) == expected


@pytest.mark.parametrize(
    ("config", "arguments", "match"),
    [
        (CONFIG, {"task_type": "workers"}, "no such job.*did you mean 'worker'"),
        (CONFIG, {"task_id": 7}, "no task with index 7 in job 'worker'"),
        (
            {"cluster": CLUSTER},
            {},
            "expected to know which task this is, got task_type None and task_id None",
        ),
        ({"cluster": CLUSTER, "task": {"type": "ps"}}, {}, "got task_type 'ps' and task_id None"),
    ],
)
def test_master_of_no_task(set_config: SetConfig, config: object, arguments: dict[str, Any], match: str) -> None:
    """L05: bad job or index is a ValueError."""
    set_config(config)
    with pytest.raises(ConfigError, match=match):
        TFConfigClusterResolver().master(**arguments)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param('{"cluster": ', "line 1, column 13: .*found the end of the text", id="L06-cut-short"),
        pytest.param("{'cluster': {}}", r"line 1, column 2: .*found \"'cluster': \{\}\}\"", id="L06-wrong-quotes"),
        pytest.param("[1]", r"the variable: expected a JSON object, got \[1\]", id="list"),
        pytest.param("null", "the variable: expected a JSON object, got null", id="null"),
        pytest.param({"cluster": None}, "'cluster': expected a JSON object, got null", id="cluster-null"),
        pytest.param({"cluster": ["w0"]}, r"'cluster': expected a JSON object, got \[\"w0\"\]", id="cluster-list"),
        pytest.param({"cluster": {"ps": "p0"}}, "cluster: tasks of job 'ps'.*got 'p0'", id="cluster-tasks"),
        pytest.param({"task": "worker"}, "'task': expected a JSON object, got \"worker\"", id="task"),
        pytest.param({"task": {"type": None}}, "'task.type': expected a string, got null", id="type-null"),
        pytest.param({"task": {"type": True}}, "'task.type': expected a string, got true", id="type-bool"),
        pytest.param({"task": {"index": "a"}}, "'task.index': expected a task index.*got 'a'", id="index-word"),
        pytest.param({"task": {"index": None}}, "'task.index': expected a task index.*got None", id="index-null"),
        pytest.param({"task": {"index": -1}}, "'task.index': expected a task index.*got -1", id="index-negative"),
        pytest.param({"rpc_layer": 1}, "'rpc_layer': expected a string, got 1", id="rpc-layer"),
        pytest.param({"session_master": 1}, "'session_master': expected a string, got 1", id="session-master"),
    ],
)
def test_malformed_config_is_never_a_silent_default(set_config: SetConfig, text: object, match: str) -> None:
    """L06, Z14: an error that names TF_CONFIG, the place and what stands there."""
    set_config(text)
    resolver = TFConfigClusterResolver()
    with pytest.raises(ConfigError, match=f"^TF_CONFIG: .*{match}"):
        _ = (resolver.cluster_spec(), resolver.task_id, resolver.task_type, resolver.master())


def test_malformed_json_keeps_its_cause(set_config: SetConfig) -> None:
    """L06."""
    set_config("{")
    with pytest.raises(ConfigError) as caught:
        load_tf_config()
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def test_num_accelerators_counts_one_task(set_config: SetConfig) -> None:
    """L07: of this task, or of the one that the arguments select, by kind and without CPUs."""
    set_config(CONFIG)
    devices = {("worker", 1): {"CPU": 1, "GPU": 2, "TPU": 8}, ("ps", 0): {"CPU": 4}, ("ps", 1): {"GPU": 3}}
    resolver = TFConfigClusterResolver(count_devices=lambda task_type, task_id: devices[task_type, task_id])  # type: ignore[index]
    assert resolver.num_accelerators() == {"GPU": 2, "TPU": 8}
    assert resolver.num_accelerators("ps", 0) == {}
    assert resolver.num_accelerators("ps") == {"GPU": 3}
    assert TFConfigClusterResolver().num_accelerators() == {}


def test_master_job_and_task_are_chief(set_config: SetConfig) -> None:
    """C07, G12, T06 (decision): in the cluster, in the task and as an override."""
    set_config({"cluster": {"master": ["m0:1"], "ps": ["p0:1"]}, "task": {"type": "master", "index": 0}})
    with pytest.warns(DeprecationWarning, match="rename it"):
        assert TFConfigClusterResolver().cluster_spec().jobs == ["chief", "ps"]
    with pytest.warns(DeprecationWarning, match="rename it"):
        assert TFConfigClusterResolver().task_type == "chief"
    with pytest.warns(DeprecationWarning, match="rename it"):
        assert SimpleClusterResolver(ClusterSpec({}), task_type="master").task_type == "chief"


@pytest.mark.filterwarnings("ignore:the job name 'master'")
def test_master_beside_chief_is_refused(set_config: SetConfig) -> None:
    """C07, G12, T06 (decision)."""
    set_config({"cluster": {"master": ["m0:1"], "chief": ["c0:1"]}})
    with pytest.raises(ConfigError, match="TF_CONFIG: cluster: job 'chief' is given twice"):
        TFConfigClusterResolver().cluster_spec()


@pytest.mark.parametrize(
    ("cluster", "task", "expected"),
    [
        (CLUSTER, {"type": "ps"}, "ps:0"),
        (CLUSTER, {"type": "worker", "index": "1"}, "worker:1"),
        ({"chief": ["c0:1"], "ps": ["p0:1", "p1:1"]}, {"type": "ps", "index": 1}, "ps:1"),
        ({"worker": ["w0:1"], "ps": ["p0:1"]}, {"type": "ps"}, "ps:0"),
    ],
)
def test_server_task(set_config: SetConfig, cluster: Any, task: Any, expected: str) -> None:
    """V05: the index is 0 where it is not given; a chief or a worker is enough."""
    set_config({"cluster": cluster, "task": task})
    spec, found = server_task()
    assert (spec, str(found)) == (ClusterSpec(cluster), expected)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        pytest.param({}, "TF_CONFIG is not set", id="V05-nothing"),
        pytest.param({"task": {"type": "ps"}}, "'cluster' is missing", id="V05-no-cluster"),
        pytest.param({"cluster": {}, "task": {"type": "ps"}}, "'cluster' is missing", id="V05-empty-cluster"),
        pytest.param({"cluster": CLUSTER}, "'task' is missing", id="V05-no-task"),
        pytest.param({"cluster": CLUSTER, "task": {"index": 0}}, "'task.type' is missing", id="V05-no-type"),
        pytest.param(
            {"cluster": {"ps": ["p0:1"]}, "task": {"type": "ps"}},
            r"'cluster': expected a chief or worker to serve, got the jobs \['ps'\]",
            id="V05-nobody-trains",
        ),
        pytest.param({"cluster": CLUSTER, "task": {"type": "ps", "index": 1}}, "ps:1 is not in", id="C11"),
    ],
)
def test_server_task_that_cannot_be(set_config: SetConfig, config: object, match: str) -> None:
    set_config(config)
    with pytest.raises(ConfigError, match=match):
        server_task()
