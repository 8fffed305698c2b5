"""The addresses of a cluster, checked when they are read."""

from __future__ import annotations

import json
from typing import Any

import pytest

import paramserver as ps
from paramserver.cluster import ClusterSpec, SimpleClusterResolver, TFConfigClusterResolver, server_task
from paramserver.cluster.addresses import check_addresses, parse_address
from paramserver.errors import ConfigError

WRONG = [
    ("host", "it has no port; add one, such as 'host:2222'"),
    ("[::1]", r"it has no port; add one, such as '\[::1\]:2222'"),
    ("", "it has no port"),
    (":2222", "it has no host; name it as the other tasks reach it"),
    ("http://host:2222", "leave out 'http://'"),
    ("grpc://host:2222", "leave out 'grpc://'"),
    (" host:2222", "remove the blanks"),
    ("host:2222 ", "remove the blanks"),
    ("ho st:2222", "remove the blanks"),
    ("host:2222\n", "remove the blanks"),
    ("a:1,b:2", r"it names several tasks; write them as a list: \['a:1', 'b:2'\]"),
    ("host:0", "a port is a number from 1 to 65535"),
    ("host:99999", "a port is a number from 1 to 65535"),
    ("host:-1", "'-1' is no port; expected a number from 1 to 65535"),
    ("host:http", "'http' is no port"),
    ("host:", "'' is no port"),
    ("host:22/", "'22/' is no port"),
    ("host:²", "'²' is no port"),
    ("::1:2222", "put an IPv6 address in brackets, to tell its port"),
    ("::1", "put an IPv6 address in brackets, to tell its port"),
    ("fe80::1:2222", "put an IPv6 address in brackets, to tell its port"),
    ("[host]:2222", "brackets are for IPv6 addresses only"),
    ("[::1:2222", "it has more than one colon, or a bracket alone"),
    ("a:b:2222", "it has more than one colon"),
]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("a:1", "a", 1),
        ("127.0.0.1:65535", "127.0.0.1", 65535),
        ("ps-0.some_name.svc:2222", "ps-0.some_name.svc", 2222),
        ("[::1]:2222", "::1", 2222),
        ("[fe80::1%eth0]:2222", "fe80::1%eth0", 2222),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert parse_address(text, "address") == (host, port)


@pytest.mark.parametrize(("text", "advice"), WRONG)
def test_a_malformed_address_is_refused_with_how_to_mend_it(text: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"^address of ps:0: expected host:port, got .*; {advice}"):
        parse_address(text, "address of ps:0")


def test_the_address_of_two_tasks_is_refused() -> None:
    cluster = ClusterSpec({"chief": ["a:1"], "ps": ["b:1", "A:1"]})
    with pytest.raises(ConfigError, match="^cluster: address of ps:1: 'A:1' is also that of chief:0; give each"):
        check_addresses(cluster, "cluster")


def test_who_listens_on_nothing_needs_no_port() -> None:
    check_addresses(ClusterSpec({"chief": ["a:0"], "worker": ["a:0", "a:0"], "ps": ["a:1"]}), "cluster")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("job", ["chief", "worker", "ps", "evaluator"])
def test_tf_config_is_checked_when_it_is_read(job: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"chief": ["c:1"], "worker": ["w:1", "w:2"], "ps": ["p:1", "p:2"], "evaluator": ["e:1"]}
    cluster = good | {job: [*good[job][:index], "http://h:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "ps", "index": 0}}))
    for read in (TFConfigClusterResolver().cluster_spec, server_task, ps.estimator.RunConfig):
        with pytest.raises(ConfigError, match=rf"^TF_CONFIG: cluster: address of {job}:\d: .* got 'http://h:1'"):
            read()


@pytest.mark.parametrize("address", ["h:0", "h:99999", "h"])
def test_a_ps_in_tf_config_has_a_port(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"cluster": {"chief": ["c:1"], "ps": [address]}, "task": {"type": "ps", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(ConfigError, match=f"^TF_CONFIG: cluster: address of ps:0: .* got '{address}'"):
        server_task()


@pytest.mark.parametrize("address", ["h:0", "http://h:1", "h"])
def test_a_cluster_that_is_passed_is_checked(address: str) -> None:
    cluster: Any = {"chief": ["c:1"], "ps": [address]}
    resolver = SimpleClusterResolver(ClusterSpec(cluster), task_type="chief", task_id=0)
    with pytest.raises(ConfigError, match=f"^cluster: address of ps:0: .* got '{address}'"):
        ps.ParameterServerStrategy(resolver)
    with pytest.raises(ConfigError, match=f"^cluster: address of ps:0: .* got '{address}'"):
        ps.ParameterServerStrategy().configure(cluster_spec=cluster, task_type="chief", task_id=0)


@pytest.mark.parametrize("address", ["http://h:1", "h", "h:99999"])
def test_the_cluster_of_a_server_is_checked(address: str) -> None:
    with pytest.raises(ConfigError, match=f"^Server: cluster: address of ps:1: .* got '{address}'"):
        ps.Server({"chief": ["c:1"], "ps": ["127.0.0.1:0", address]}, "ps", 0)
