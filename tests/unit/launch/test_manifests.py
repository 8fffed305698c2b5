"""Manifests for Kubernetes: as the goldens are, and what of bad options is refused."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from tests.unit.launch.manifest_cases import CASES, GOLDENS, LARGE, SMALL, text
from typer.testing import CliRunner, Result

from paramserver import cli
from paramserver.cluster import own_task, resolve
from paramserver.cluster.task import Role
from paramserver.errors import ConfigError
from paramserver.launch.manifests import KINDS, objects
from paramserver.launch.manifests.command import HELP
from paramserver.launch.manifests.options import ManifestOptions, parse_resources


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["manifest", *arguments], env={"COLUMNS": "80"}, prog_name="paramserver")


def pods(kind: str, options: ManifestOptions) -> dict[str, Any]:
    """The pod specifications of a manifest, by the name of their job, replica type or task."""
    (*_, last) = [each for each in objects(kind, options) if each["kind"] not in ("Secret", "TrainJob")]
    spec = last["spec"]
    if kind == "tfjob":
        return {name: replica["template"]["spec"] for name, replica in spec["tfReplicaSpecs"].items()}
    if kind == "volcano":
        return {task["name"]: task["template"]["spec"] for task in spec["tasks"]}
    jobs = (spec["template"]["spec"] if kind == "trainer" else spec)["replicatedJobs"]
    return {job["name"]: job["template"]["spec"]["template"]["spec"] for job in jobs}


@pytest.mark.parametrize("name", CASES)
def test_a_manifest_is_its_golden(name: str) -> None:
    assert text(name) == (GOLDENS / f"{name}.yaml").read_text(encoding="utf-8"), "make goldens, and look at the change"


def test_each_golden_is_of_a_case() -> None:
    assert {path.stem for path in GOLDENS.glob("*.yaml")} == set(CASES)


def test_each_kind_has_a_golden_and_a_help() -> None:
    assert {kind for kind, _ in CASES.values()} == set(KINDS) == set(HELP)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_runs_the_same_command(kind: str) -> None:
    containers = [pod["containers"][0] for pod in pods(kind, LARGE).values()]
    commands = {(*container["command"], *container["args"]) for container in containers}
    assert commands == {("paramserver", "task", "-m", "package.train", *LARGE.args)}
    assert len(containers) == len(Role)


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_is_in_a_secret_and_nowhere_else(kind: str) -> None:
    secret, *others = objects(kind, LARGE)
    assert secret["stringData"] == {"token": "0123"}
    assert "0123" not in str(others)
    assert "Secret" not in {each["kind"] for each in objects(kind, SMALL)}


@pytest.mark.parametrize("kind", KINDS)
def test_chief_and_evaluator_alone_mount_the_volume(kind: str) -> None:
    mounted = [name.lower() for name, pod in pods(kind, LARGE).items() if "models" in str(pod.get("volumes"))]
    assert sorted(mounted) == ["chief", "evaluator"]


def tfjob_cluster(job: dict[str, Any]) -> dict[str, list[str]]:
    """The cluster that the training operator makes of a TFJob: a headless service for each pod."""
    cluster = {}
    for kind, replica in job["spec"]["tfReplicaSpecs"].items():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "tensorflow"
        (port,) = [each["containerPort"] for each in container["ports"] if each["name"] == "tfjob-port"]
        names = [f"{job['metadata']['name']}-{kind.lower()}-{index}" for index in range(replica["replicas"])]
        cluster[kind.lower()] = [f"{name}.{job['metadata']['namespace']}.svc:{port}" for name in names]
    return cluster


def volcano_cluster(job: dict[str, Any]) -> dict[str, list[str]]:
    """The cluster that Volcano's plug-in makes of a Job: names of the pods in the subdomain of the job."""
    flags = dict(flag.removeprefix("--").split("=") for flag in job["spec"]["plugins"]["tensorflow"])
    name, port = job["metadata"]["name"], flags.pop("port")
    roles = {task: role for role, task in flags.items()}
    return {
        roles[task["name"]]: [f"{name}-{task['name']}-{index}.{name}:{port}" for index in range(task["replicas"])]
        for task in job["spec"]["tasks"]
    }


@pytest.mark.parametrize(("kind", "make"), [("tfjob", tfjob_cluster), ("volcano", volcano_cluster)])
def test_a_pod_finds_itself_in_the_tf_config_that_its_operator_makes(
    kind: str, make: Callable[[dict[str, Any]], dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = [each for each in objects(kind, LARGE) if each["kind"] != "Secret"]
    cluster = make(job)
    assert {role: len(names) for role, names in cluster.items()} == {r: n.size for r, n in LARGE.jobs.items()}
    for role, names in cluster.items():
        task = {"type": role, "index": len(names) - 1}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task, "environment": "cloud"}))
        known, me = own_task(resolve())
        assert str(me) == f"{role}:{len(names) - 1}"
        assert known.address(me) == names[-1]
        assert names[-1].endswith(":5000")


def test_the_probe_finds_a_port_that_is_listened_on_and_no_other() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        options = ManifestOptions(image="i", script="s", port=port)
        probe = pods("jobset", options)["ps"]["containers"][0]["readinessProbe"]["exec"]["command"]
        assert subprocess.run(probe, check=False).returncode == 0
    assert subprocess.run(probe, check=False).returncode == 1


def test_a_run_of_a_chief_and_a_ps_has_no_other_job() -> None:
    assert list(pods("jobset", ManifestOptions(image="i", script="s"))) == ["ps", "chief"]


def test_resources_are_those_of_the_role_over_those_of_all_over_the_defaults() -> None:
    resources = parse_resources(["memory=8Gi", "ps:memory=16Gi,hugepages-2Mi=1Gi"])
    options = ManifestOptions(image="i", script="s", resources=resources)
    assert options.resources_of(Role.CHIEF) == {"cpu": "2", "memory": "8Gi"}
    assert options.resources_of(Role.PS) == {"cpu": "2", "memory": "16Gi", "hugepages-2Mi": "1Gi"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps": 0}, "ps: expected 1 or more, got 0"),
        ({"workers": -1}, "workers: expected 1 or more, got -1"),
        ({"restarts": -1}, "restarts: expected 0 or more"),
        ({"port": 70000}, "port: expected a number from 1 to 65535"),
        ({"image": " "}, "image: expected one, got an empty text"),
        ({"script": ""}, "script: expected one"),
        ({"name": "Train"}, "name: expected at most 63 small letters, .* got 'Train'"),
        ({"name": "1st"}, "name: .* got '1st'"),
        ({"name": "a.b"}, "name: .* got 'a.b'"),
        ({"namespace": "a_b"}, "namespace: .* got 'a_b'"),
        ({"pvc": "a/b"}, "pvc: .* with dots between such parts, got 'a/b'"),
        ({"pvc": "a", "model_dir": "b"}, "pvc, model_dir: expected one of them"),
        ({"restart_with": "job"}, "restart with: expected one of pods, jobs, got 'job'"),
        ({"name": "x" * 48}, "makes the name 'x*-chief-0-0-abcde' of a pod.* shorten it by 1"),
        ({"name": "x" * 47, "workers": 12}, "makes the name 'x*-worker-10-0-abcde'.* shorten it by 2"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ManifestOptions(**({"image": "i", "script": "s"} | changes))


def test_the_longest_name_that_fits_is_allowed() -> None:
    assert ManifestOptions(image="i", script="s", name="x" * 47).name


@pytest.mark.parametrize("text", ["cpu", "ps:", "ps:cpu=many", "ps:cpu=2;memory=1Gi", "ps:=2", "ps:cpu=-1"])
def test_malformed_resources_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected ROLE:NAME=QUANTITY"):
        parse_resources([text])


def test_resources_of_no_role_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'worker'"):
        parse_resources(["wroker:cpu=2"])


def test_the_command_prints_yaml() -> None:
    result = invoke("jobset", "--image", "train:1", "--ps", "2", "--workers", "2", "train.py")
    assert result.exit_code == 0
    assert result.stdout == text("jobset")


def test_options_after_the_script_are_the_scripts() -> None:
    result = invoke("tfjob", "--image", "train:1", "train.py", "--ps", "7")
    (job,) = yaml.safe_load_all(result.stdout)
    replica = job["spec"]["tfReplicaSpecs"]["PS"]
    assert replica["template"]["spec"]["containers"][0]["args"] == ["train.py", "--ps", "7"]
    assert replica["replicas"] == 1


def test_a_token_is_printed_if_it_is_asked_for_and_is_another_one_each_time() -> None:
    printed = [invoke("jobset", "--image", "i", "--with-secret", "s").stdout for _ in range(2)]
    tokens = {next(iter(yaml.safe_load_all(text)))["stringData"]["token"] for text in printed}
    assert len(tokens) == 2
    assert all(len(token) == 64 for token in tokens)


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    result = invoke("jobst", "--image", "i", "s")
    assert result.exit_code == 2
    assert "Did you mean 'jobset'" in result.stderr
    with pytest.raises(ConfigError, match="got 'volcanoo'; did you mean 'volcano'"):
        objects("volcanoo", SMALL)


def test_without_pyyaml_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def imports(name: str, *rest: Any) -> Any:
        if name == "yaml":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", imports)
    with pytest.raises(ConfigError, match=r"PyYAML is missing: pip install 'paramserver\[kubernetes\]'"):
        text("jobset")


def test_the_command_line_starts_without_pyyaml() -> None:
    code = "import sys; import paramserver.cli; sys.exit('yaml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
