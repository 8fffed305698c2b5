"""Where the cluster of a process is described."""

from __future__ import annotations

import logging

import pytest

from paramserver.cluster import SimpleClusterResolver, TFConfigClusterResolver, own_task, resolve
from paramserver.cluster.spec import ClusterSpec
from paramserver.errors import ConfigError

TF_CONFIG = '{"cluster": {"chief": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}'


def test_tf_config_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramserver")
    monkeypatch.setenv("TF_CONFIG", TF_CONFIG)
    resolver = resolve()
    assert resolver.cluster_spec() == ClusterSpec({"chief": ["a:1"], "ps": ["b:1"]})
    assert "tf-config, because TF_CONFIG is set" in caplog.text
    assert str(own_task(resolver)[1]) == "ps:0"


def test_a_process_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramserver")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    resolver = resolve()
    assert not resolver.cluster_spec()
    assert "this process is alone, because none of TF_CONFIG" in caplog.text
    with pytest.raises(ConfigError, match="TF_CONFIG is not set"):
        own_task(resolver)


def test_a_source_that_is_asked_for() -> None:
    assert isinstance(resolve("tf-config"), TFConfigClusterResolver)
    with pytest.raises(ConfigError, match="got 'tf-confg'; did you mean 'tf-config'"):
        resolve("tf-confg")


def test_a_resolver_without_a_task_is_refused() -> None:
    resolver = SimpleClusterResolver(ClusterSpec({"chief": ["a:1"], "ps": ["b:1"]}))
    with pytest.raises(ConfigError, match="does not know which task"):
        own_task(resolver)
    resolver.task_type, resolver.task_id = "ps", 0
    assert str(own_task(resolver)[1]) == "ps:0"
