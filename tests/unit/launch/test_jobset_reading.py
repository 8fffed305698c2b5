"""The manifest of a JobSet as it is read, and its pods as tasks on this machine."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.launch.manifest_cases import LARGE, SMALL, text

from paramserver.cluster import JobSetClusterResolver
from paramserver.cluster.jobset import Layout
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.jobsets.jobset import JobSet
from paramserver.launch.jobsets.options import JobSetOptions, parse_mounts
from paramserver.launch.jobsets.pods import Machine, plan
from paramserver.launch.jobsets.reading import read_jobset
from paramserver.launch.jobsets.run import read
from paramserver.launch.lifecycle import Limits
from paramserver.launch.manifests import objects
from paramserver.launch.spec import TaskSpec

Change = Callable[[dict[str, Any]], object]


def small() -> dict[str, Any]:
    (manifest,) = objects("jobset", SMALL)
    return json.loads(json.dumps(manifest))  # type: ignore[no-any-return]  # that of an object


def container(manifest: dict[str, Any], job: int = 0) -> dict[str, Any]:
    pod = manifest["spec"]["replicatedJobs"][job]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]  # type: ignore[no-any-return]  # a manifest has no type


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes documents into a file."""

    def write(*documents: object) -> Path:
        path = tmp_path / "jobset.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        return path

    return write


def planned(jobset: JobSet, **machine: Any) -> dict[TaskId, TaskSpec]:
    ports = [5000 + index for index in range(sum(pod.task.role is Role.PS for pod in jobset.pods()))]
    given = {"run_id": "1f0c", "token": "own", "python": sys.executable, "ports": ports} | machine
    return {task.task: task for task in plan(jobset, Machine(**given), Limits()).tasks}


def test_a_printed_manifest_is_read_as_it_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(text("jobset-large"))
    jobset = read_jobset(path)
    assert (jobset.name, jobset.namespace, jobset.subdomain) == ("recommender", "team", "recommender")
    assert {job.name: job.layout for job in jobset.jobs} == LARGE.jobs
    assert jobset.success_targets == {"chief", "evaluator"}
    assert jobset.max_restarts == 0
    assert jobset.secrets == {"recommender-token": {"token": "0123"}}
    (ps, *_) = jobset.jobs
    assert (ps.backoff_limit, ps.grace, ps.port) == (5, 80.0, 5000)
    assert [rule.codes for rule in ps.exit_rules] == [{75, 130, 143}]
    assert {"images", "resources", "probes", "security contexts"} <= set(jobset.left_out)


def test_pods_have_the_environment_of_jobset_and_its_resolver_finds_them(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = planned(read_jobset(written(small())))
    assert list(map(str, tasks)) == ["ps:0", "ps:1", "chief:0", "worker:0"]
    env = tasks[TaskId(Role.PS, 1)].env
    expected = {
        "HOSTNAME": "train-ps-1-0",
        "JOBSET_NAME": "train",
        "REPLICATED_JOB_NAME": "ps",
        "JOB_INDEX": "1",
        "JOB_COMPLETION_INDEX": "0",
        "PARAMSERVER_JOBS": "ps=2,chief=1,worker=1",
        "PARAMSERVER_RUN_ID": "1f0c",
        "PARAMSERVER_TOKEN": "own",
    }
    assert {name: env[name] for name in expected} == expected
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    resolver = JobSetClusterResolver()
    assert resolver.cluster_spec().job_tasks("ps") == ["127.0.0.1:5000", "127.0.0.1:5001"]
    assert (resolver.task_type, resolver.task_id) == ("ps", 1)


def test_the_commands_of_the_image_are_those_of_this_interpreter(written: Callable[..., Path]) -> None:
    manifest = small()
    container(manifest, 1)["command"] = ["/usr/bin/python3.12", "-m", "paramserver", "task"]
    container(manifest, 2)["command"] = ["sh", "-c", "exec paramserver task train.py"]
    tasks = planned(read_jobset(written(manifest)))
    expected = (sys.executable, "-m", "paramserver", "task", "train.py")
    assert tasks[TaskId(Role.PS, 0)].command == expected
    assert tasks[TaskId(Role.CHIEF, 0)].command == expected
    assert tasks[TaskId(Role.WORKER, 0)].command[:2] == ("sh", "-c")


def test_several_pods_of_a_job_are_counted(written: Callable[..., Path]) -> None:
    manifest = small()
    worker = manifest["spec"]["replicatedJobs"][2]
    worker["replicas"], worker["template"]["spec"]["completions"] = 2, 3
    jobset = read_jobset(written(manifest))
    assert jobset.jobs[2].layout == Layout(2, 3)
    env = planned(jobset)[TaskId(Role.WORKER, 5)].env
    assert (env["HOSTNAME"], env["JOB_INDEX"], env["JOB_COMPLETION_INDEX"]) == ("train-worker-1-2", "1", "2")


def test_variables_are_expanded_and_come_from_where_the_manifest_says(written: Callable[..., Path]) -> None:
    manifest = small()
    secret = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"key": base64.b64encode(b"hidden").decode()}}
    container(manifest, 1)["env"] += [
        {"name": "A", "value": "$(JOBSET_NAME)/$(NONE)/$$(JOBSET_NAME)"},
        {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "C", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
        {"name": "D", "valueFrom": {"secretKeyRef": {"name": "none", "key": "key", "optional": True}}},
        {"name": "E", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "key"}}},
        {"name": "F", "value": "train-ps-1-0.train:2222"},
    ]
    container(manifest, 1)["args"] = ["train.py", "$(A)"]
    task = planned(read_jobset(written(secret, manifest)), environment={"E": "of this shell"})[TaskId(Role.CHIEF, 0)]
    found = {name: task.env.get(name) for name in "ABCDEF"}
    assert found == {
        "A": "train/$(NONE)/$(JOBSET_NAME)",
        "B": "default",
        "C": "hidden",
        "D": None,
        "E": "of this shell",
        "F": "127.0.0.1:5001",
    }
    assert task.command[-1] == "train/$(NONE)/$(JOBSET_NAME)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"secretKeyRef": {"name": "s", "key": "k"}}, "env X of chief:0: expected the Secret 's' with the key 'k'"),
        ({"configMapKeyRef": {"name": "s", "key": "k"}}, "env X of chief:0: configMapKeyRef has no value on this"),
        ({"fieldRef": {"fieldPath": "spec.none"}}, "env X of chief:0: the field 'spec.none' has no value"),
    ],
)
def test_a_variable_without_a_value_is_an_error(
    source: Mapping[str, Any], message: str, written: Callable[..., Path]
) -> None:
    manifest = small()
    container(manifest, 1)["env"].append({"name": "X", "valueFrom": source})
    with pytest.raises(ConfigError, match=message):
        planned(read_jobset(written(manifest)))


def test_a_command_that_is_not_here_is_an_error(written: Callable[..., Path]) -> None:
    manifest = small()
    container(manifest, 1)["command"] = ["no-such-program"]
    with pytest.raises(ConfigError, match="of chief:0: there is no 'no-such-program'.*executable file not found"):
        planned(read_jobset(written(manifest)))


def test_a_volume_needs_a_folder_which_an_option_may_name(tmp_path: Path, written: Callable[..., Path]) -> None:
    manifest = small()
    path = "/no/such/folder"
    container(manifest, 1)["volumeMounts"] = [{"name": "model", "mountPath": path}]
    container(manifest, 1)["args"] = ["train.py", f"--model-dir={path}/a"]
    file = written(manifest)
    with pytest.raises(ConfigError, match="mounted at '/no/such/folder'.*--mount /no/such/folder=FOLDER"):
        read(JobSetOptions(path=file))
    mounts = parse_mounts([f"{path}={tmp_path}"])
    jobset = read(JobSetOptions(path=file, mounts=mounts))
    assert planned(jobset, mounts=mounts)[TaskId(Role.CHIEF, 0)].command[-1] == f"--model-dir={tmp_path}/a"


@pytest.mark.parametrize("mount", ["/model", "model=run", "/model="])
def test_a_malformed_mount_is_refused(mount: str) -> None:
    with pytest.raises(ConfigError, match="--mount: expected PATH=FOLDER"):
        parse_mounts([mount])


def test_a_file_without_a_jobset_is_refused(tmp_path: Path, written: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"jobset.yaml: expected a JobSet, .* got Pod, Secret"):
        read_jobset(written({"kind": "Pod"}, {"kind": "Secret"}, None, 3))
    with pytest.raises(ConfigError, match="expected a JobSet, .* got nothing"):
        read_jobset(written())
    with pytest.raises(ConfigError, match="none.yaml: No such file"):
        read_jobset(tmp_path / "none.yaml")
    (tmp_path / "text").write_text("a: [b")
    with pytest.raises(ConfigError, match="text is not YAML: .* line 1"):
        read_jobset(tmp_path / "text")
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="bytes is not YAML"):
        read_jobset(tmp_path / "bytes")


def test_of_several_jobsets_one_is_chosen(written: Callable[..., Path]) -> None:
    other = small()
    other["metadata"]["name"] = "other"
    path = written(small(), other)
    with pytest.raises(ConfigError, match="expected one JobSet, got 'train', 'other'; choose one with --name"):
        read_jobset(path)
    assert read_jobset(path, "other").name == "other"
    with pytest.raises(ConfigError, match="got 'trains'; did you mean 'train'"):
        read_jobset(path, "trains")


def in_job(job: int, change: Change) -> Change:
    return lambda manifest: change(manifest["spec"]["replicatedJobs"][job])


def in_spec(**parts: Any) -> Change:
    return lambda manifest: manifest["spec"].update(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_spec(replicatedJobs=None), "expected a ps, and a chief or a worker, got \\[\\]"),
        (lambda manifest: manifest["spec"]["replicatedJobs"].pop(0), "got \\['chief', 'worker'\\]; add the other"),
        (in_job(0, lambda job: job.update(replicas=0)), "got \\['chief', 'worker'\\]; add the other"),
        (
            in_job(0, lambda job: job.update(replicas=-1)),
            r"Jobs\[0\]: replicas: expected a number, 0 or more, got -1",
        ),
        (in_job(0, lambda job: job.update(replicas="2")), "replicas: expected a number, 0 or more, got '2'"),
        (in_job(2, lambda job: job.update(name="wroker")), "the name of a role.* did you mean 'worker'"),
        (in_job(2, lambda job: job.update(name="ps")), "expected different names, got \\['ps', 'chief', 'ps'\\]"),
        (in_job(1, lambda job: job.update(template=3)), r"replicatedJobs\[1\]: template: expected an object, got 3"),
        (in_spec(replicatedJobs={}), "spec: replicatedJobs: expected a list"),
        (in_spec(replicatedJobs=[3]), r"replicatedJobs\[0\]: expected an object, got 3"),
        (in_spec(successPolicy={"targetReplicatedJobs": ["chiefs"]}), "successPolicy.targetReplicatedJobs: .*'chief'"),
        (in_spec(failurePolicy={"rules": [{"action": "RestartJobs"}]}), r"rules\[0\].action: .* mean 'RestartJob'"),
        (lambda manifest: container(manifest).pop("command"), "expected a command in the container of 'ps', got none"),
        (lambda manifest: manifest.update(apiVersion="batch/v1"), "apiVersion: expected jobset.x-k8s.io/v1alpha2"),
        (lambda manifest: manifest["metadata"].pop("name"), "metadata.name: expected the name of the JobSet"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(change: Change, message: str, written: Callable[..., Path]) -> None:
    manifest = small()
    change(manifest)
    with pytest.raises(ConfigError, match=f"jobset.yaml: .*{message}"):
        read_jobset(written(manifest))


def test_a_secret_that_is_not_in_base64_is_refused(written: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="Secret s: data.k: expected text in base64"):
        read_jobset(written(small(), {"kind": "Secret", "metadata": {"name": "s"}, "data": {"k": "?"}}))
