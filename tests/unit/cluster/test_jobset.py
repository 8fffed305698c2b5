"""The cluster of a JobSet, from the environment of a pod."""

from __future__ import annotations

import json
import logging

import pytest

from paramserver.cluster import JobSetClusterResolver, own_task, resolve
from paramserver.cluster.jobset import VARIABLES
from paramserver.cluster.spec import ClusterSpec
from paramserver.errors import ConfigError

POD = {
    "JOBSET_NAME": "train",
    "REPLICATED_JOB_NAME": "worker",
    "JOB_INDEX": "1",
    "JOB_COMPLETION_INDEX": "0",
    "PARAMSERVER_JOBS": "ps=2,chief=1,worker=2,evaluator=1",
}


@pytest.fixture(autouse=True)
def pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TF_CONFIG", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in POD.items():
        monkeypatch.setenv(name, value)


def test_the_names_of_the_pods_are_those_of_the_rule() -> None:
    resolver = JobSetClusterResolver()
    assert resolver.cluster_spec() == ClusterSpec(
        {
            "ps": ["train-ps-0-0.train:2222", "train-ps-1-0.train:2222"],
            "chief": ["train-chief-0-0.train:2222"],
            "worker": ["train-worker-0-0.train:2222", "train-worker-1-0.train:2222"],
        }
    )
    assert str(own_task(resolver)[1]) == "worker:1"
    assert resolver.master() == "train-worker-1-0.train:2222"
    assert resolver.master("ps", 0, "grpc") == "grpc://train-ps-0-0.train:2222"
    assert resolver.environment == "kubernetes"


def test_it_is_found_because_of_the_name_of_the_jobset(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramserver")
    assert isinstance(resolve(), JobSetClusterResolver)
    assert "jobset, because JOBSET_NAME is set" in caplog.text


def test_pods_of_one_job_count_in_the_order_of_their_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMSERVER_JOBS", "ps=1,worker=2x3")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    resolver = JobSetClusterResolver()
    assert (resolver.task_type, resolver.task_id) == ("worker", 5)
    assert resolver.master() == "train-worker-1-2.train:2222"


def test_an_evaluator_stands_outside_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATED_JOB_NAME", "evaluator")
    monkeypatch.setenv("JOB_INDEX", "0")
    resolver = JobSetClusterResolver()
    assert "evaluator" not in resolver.cluster_spec().jobs
    assert str(own_task(resolver)[1]) == "evaluator:0"


def test_arguments_replace_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARAMSERVER_JOBS")
    monkeypatch.setenv("PARAMSERVER_SUBDOMAIN", "theirs")
    given = JobSetClusterResolver(
        "ps=1,worker=2", port=99, subdomain="net", task_type="ps", task_id=0, rpc_layer="grpc"
    )
    assert given.master() == "grpc://train-ps-0-0.net:99"
    assert JobSetClusterResolver("ps=1,worker=2").master("ps", 0) == "train-ps-0-0.theirs:2222"


def test_addresses_of_pods_on_this_machine_replace_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMSERVER_POD_ADDRESSES", json.dumps({"train-ps-1-0.train:2222": "127.0.0.1:5000"}))
    addresses = JobSetClusterResolver().cluster_spec().job_tasks("ps")
    assert addresses == ["train-ps-0-0.train:2222", "127.0.0.1:5000"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JOBSET_NAME", "", "JOBSET_NAME is not set.*downward API, from the label 'jobset.sigs.k8s.io/jobset-name'"),
        ("REPLICATED_JOB_NAME", "", "REPLICATED_JOB_NAME is not set"),
        ("REPLICATED_JOB_NAME", "workers", "expected the replicated job 'workers' of this pod, got only"),
        ("PARAMSERVER_JOBS", "", "PARAMSERVER_JOBS is not set"),
        ("PARAMSERVER_JOBS", "ps=2,wroker=1", "got 'wroker'; did you mean 'worker'"),
        ("PARAMSERVER_JOBS", "ps=0,worker=2", "expected a list such as .* got 'ps=0'"),
        ("PARAMSERVER_JOBS", "ps=-1,worker=2", "got 'ps=-1'"),
        ("PARAMSERVER_JOBS", "worker=2", "expected a ps, and a chief or a worker, got 'worker=2'"),
        ("PARAMSERVER_JOBS", "ps=2,evaluator=1", "expected a ps, and a chief or a worker"),
        ("JOB_INDEX", "2", "JOB_INDEX: expected an index below 2, as PARAMSERVER_JOBS says"),
        ("JOB_COMPLETION_INDEX", "1", "JOB_COMPLETION_INDEX: expected an index below 1"),
        ("PARAMSERVER_PS_PORT", "http", "PARAMSERVER_PS_PORT: expected a port from 1 to 65535, got 'http'"),
        ("PARAMSERVER_POD_ADDRESSES", "[]", "expected a JSON object"),
        ("PARAMSERVER_POD_ADDRESSES", "{", "expected a JSON object"),
    ],
)
def test_what_is_missing_or_malformed_is_named(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        own_task(JobSetClusterResolver())
