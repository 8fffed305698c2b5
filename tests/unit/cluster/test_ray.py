"""The cluster of a run on Ray."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from paramserver.cluster import ClusterSpec, RayClusterResolver, own_task, resolve
from paramserver.cluster.task import Role, TaskId
from paramserver.cluster.tf_config import as_tf_config
from paramserver.errors import ConfigError

WORKER = TaskId(Role.WORKER, 0)


def cluster(port: int) -> dict[str, list[str]]:
    return {"ps": [f"10.0.0.1:{port}"], "chief": ["127.0.0.1:0"], "worker": ["127.0.0.1:0"]}


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "tf-config.json"
    path.write_text(as_tf_config(cluster(1), WORKER))
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("PARAMSERVER_TF_CONFIG_FILE", str(path))
    monkeypatch.setenv("PARAMSERVER_RAY_RUN", "paramserver-1f0c")
    return path


def test_the_cluster_is_that_of_the_moment(file: Path) -> None:
    resolver = RayClusterResolver()
    assert (resolver.task_type, resolver.task_id, resolver.environment) == ("worker", 0, "ray")
    assert resolver.cluster_spec() == ClusterSpec(cluster(1))
    file.write_text(as_tf_config(cluster(2), WORKER))
    assert resolver.cluster_spec().task_address("ps", 0) == "10.0.0.1:2"
    assert RayClusterResolver("grpc").master("ps", 0) == "grpc://10.0.0.1:2"


@pytest.mark.usefixtures("file")
def test_a_task_of_a_run_finds_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramserver")
    resolver = resolve()
    assert isinstance(resolver, RayClusterResolver)
    assert "ray, because PARAMSERVER_RAY_RUN is set" in caplog.text
    assert own_task(resolver) == (ClusterSpec(cluster(1)), WORKER)


def test_elsewhere_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARAMSERVER_RAY_RUN", raising=False)
    resolver = RayClusterResolver()
    for ask in (resolver.cluster_spec, resolver.master, lambda: resolver.task_type):
        with pytest.raises(ConfigError, match="no task of a run on Ray: PARAMSERVER_RAY_RUN is not set; start"):
            ask()
