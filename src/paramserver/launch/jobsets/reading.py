"""The manifest of a JobSet, read from YAML: what is wrong is named by its place in the manifest."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from paramserver.cluster.jobset import PORT, PS_PORT, Layout
from paramserver.cluster.roles import parse_role
from paramserver.cluster.spec import expected_one_of
from paramserver.cluster.task import Role
from paramserver.errors import ConfigError
from paramserver.launch.jobsets.jobset import BACKOFF_LIMIT, ExitRule, FailureRule, JobSet, ReplicatedJob
from paramserver.launch.manifests.text import MISSING

Node: TypeAlias = Mapping[str, Any]

API = "jobset.x-k8s.io/"

ACTIONS = (
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
)

POD_PARTS = {
    "initContainers": "init containers",
    "securityContext": "security contexts",
    "nodeSelector": "node selectors",
    "affinity": "affinities",
    "tolerations": "tolerations",
}
CONTAINER_PARTS = {
    "image": "images",
    "resources": "resources",
    "livenessProbe": "probes",
    "readinessProbe": "probes",
    "startupProbe": "probes",
    "lifecycle": "hooks",
    "workingDir": "working directories",
    "envFrom": "envFrom",
}
"""Parts that a run on one machine leaves out, and what they are called."""


def read_jobset(path: Path, name: str | None = None) -> JobSet:
    """Return the JobSet in a file.

    Args:
        path: The file, with any number of documents of YAML.
        name: The name of the JobSet, if there are several.

    Raises:
        ConfigError: If there is none, or several, or it is malformed, or PyYAML is not installed.
    """
    documents = [each for each in _documents(path) if isinstance(each, dict)]
    jobsets = [each for each in documents if each.get("kind") == "JobSet"]
    if not jobsets:
        kinds = ", ".join(sorted({str(each.get("kind")) for each in documents})) or "nothing"
        raise ConfigError(f"{path}: expected a JobSet, such as `paramserver manifest jobset` prints, got {kinds}")
    names = [str(_at(each, "metadata", dict, "JobSet").get("name", "")) for each in jobsets]
    if name is None and len(jobsets) > 1:
        raise ConfigError(f"{path}: expected one JobSet, got {', '.join(map(repr, names))}; choose one with --name")
    if name is not None and name not in names:
        raise ConfigError(f"{path}: JobSet: {expected_one_of(names, name)}")
    chosen = jobsets[0 if name is None else names.index(name)]
    try:
        return _jobset(chosen, _secrets(documents))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _documents(path: Path) -> list[object]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError(f"launch --manifest: {MISSING}") from error
    try:
        return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"launch --manifest: {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"launch --manifest: {path} is not YAML: {' '.join(str(error).split())}") from error


def _secrets(documents: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for each in documents:
        if each.get("kind") == "Secret":
            name = str(_at(each, "metadata", dict, "Secret").get("name", ""))
            encoded = _at(each, "data", dict, f"Secret {name}")
            plain = _at(each, "stringData", dict, f"Secret {name}")
            found[name] = {key: _decoded(str(value), name, key) for key, value in encoded.items()}
            found[name] |= {key: str(value) for key, value in plain.items()}
    return found


def _decoded(text: str, name: str, key: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"Secret {name}: data.{key}: expected text in base64") from error


def _jobset(manifest: Node, secrets: Mapping[str, Mapping[str, str]]) -> JobSet:
    version = str(manifest.get("apiVersion", ""))
    if not version.startswith(API):
        raise ConfigError(f"JobSet: apiVersion: expected {API}v1alpha2, got {version!r}")
    metadata = _at(manifest, "metadata", dict, "JobSet")
    spec = _at(manifest, "spec", dict, "JobSet")
    name = str(metadata.get("name") or "")
    if not name:
        raise ConfigError("JobSet: metadata.name: expected the name of the JobSet, got none")
    listed = _at(spec, "replicatedJobs", list, "spec")
    jobs = tuple(_replicated_job(each, f"spec.replicatedJobs[{index}]") for index, each in enumerate(listed))
    jobs = tuple(job for job in jobs if job.layout.size)
    _check_roles(jobs)
    network = _at(spec, "network", dict, "spec")
    success = _at(spec, "successPolicy", dict, "spec")
    failure, policy = spec.get("failurePolicy"), _at(spec, "failurePolicy", dict, "spec")
    return JobSet(
        name=name,
        namespace=str(metadata.get("namespace") or "default"),
        subdomain=str(network.get("subdomain") or name),
        jobs=jobs,
        success_operator=str(success.get("operator", "All")),
        success_targets=_names(success, "targetReplicatedJobs", "spec.successPolicy", jobs),
        max_restarts=None if failure is None else _count(policy, "maxRestarts", 0, "spec.failurePolicy"),
        rules=tuple(_failure_rules(policy, jobs)),
        secrets=secrets,
        left_out=tuple(dict.fromkeys(_left_out(spec, jobs))),
    )


def _check_roles(jobs: tuple[ReplicatedJob, ...]) -> None:
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise ConfigError(f"spec.replicatedJobs: expected different names, got {names}")
    roles = {job.role for job in jobs}
    if Role.PS not in roles or not roles & {Role.CHIEF, Role.WORKER}:
        raise ConfigError(f"spec.replicatedJobs: expected a ps, and a chief or a worker, got {names}; add the other")


def _replicated_job(node: object, place: str) -> ReplicatedJob:
    job = _dict(node, place)
    name = str(job.get("name", ""))
    role = _role(name, place)
    template = _at(_at(job, "template", dict, place), "spec", dict, f"{place}.template")
    pod_template = _at(template, "template", dict, f"{place}.template.spec")
    pod = _at(pod_template, "spec", dict, f"{place}.template.spec.template")
    metadata = _at(pod_template, "metadata", dict, place)
    container = _container(pod, name, place)
    env = tuple(_dict(each, f"{place}: env") for each in _at(container, "env", list, f"{place}: container"))
    completions = _count(template, "completions", _count(template, "parallelism", 1, place), place)
    return ReplicatedJob(
        name=name,
        role=role,
        layout=Layout(_count(job, "replicas", 1, place), completions),
        command=tuple(str(word) for key in ("command", "args") for word in _at(container, key, list, place)),
        env=env,
        labels={str(key): str(value) for key, value in _at(metadata, "labels", dict, place).items()},
        annotations={str(key): str(value) for key, value in _at(metadata, "annotations", dict, place).items()},
        mounts=tuple(str(each.get("mountPath")) for each in _at(container, "volumeMounts", list, place)),
        port=_port(container, env, place),
        backoff_limit=_count(template, "backoffLimit", BACKOFF_LIMIT, place),
        exit_rules=tuple(_exit_rules(template, place)),
        grace=float(_count(pod, "terminationGracePeriodSeconds", 30, place)),
    )


def _container(pod: Node, job: str, place: str) -> Node:
    """Return the first container of a pod, which has a command."""
    containers = _at(pod, "containers", list, f"{place}.template.spec.template.spec")
    if not containers:
        raise ConfigError(f"{place}: expected a container in the pods of {job!r}, got none")
    container = _dict(containers[0], f"{place}: container")
    if not _at(container, "command", list, f"{place}: container"):
        raise ConfigError(
            f"{place}: expected a command in the container of {job!r}, got none; the image is not used here, so its "
            "own command is not known"
        )
    return container


def _role(name: str, place: str) -> Role:
    try:
        return parse_role(name)
    except ConfigError as error:
        raise ConfigError(f"{place}.name: expected the name of a role: {error}") from error


def _port(container: Node, env: tuple[Node, ...], place: str) -> int:
    given = {str(each.get("name")): each.get("value") for each in env}
    ports = [each.get("containerPort") for each in _at(container, "ports", list, place)]
    port = given.get(PS_PORT) or next(iter(ports), None) or PORT
    if not str(port).isdecimal():
        raise ConfigError(f"{place}: expected the number of a port, got {port!r}")
    return int(port)


def _exit_rules(template: Node, place: str) -> Iterator[ExitRule]:
    policy = _at(template, "podFailurePolicy", dict, place)
    for rule in _at(policy, "rules", list, f"{place}: podFailurePolicy"):
        codes = _dict(rule, f"{place}: podFailurePolicy").get("onExitCodes")
        if codes:  # conditions of a pod, such as that of a node that is drained, do not occur here
            action = "FailJob" if rule.get("action") == "FailIndex" else str(rule.get("action"))
            yield ExitRule(
                action=action, codes=frozenset(codes.get("values", ())), is_negated=codes.get("operator") == "NotIn"
            )


def _failure_rules(policy: Node, jobs: tuple[ReplicatedJob, ...]) -> Iterator[FailureRule]:
    for index, each in enumerate(_at(policy, "rules", list, "spec.failurePolicy")):
        place = f"spec.failurePolicy.rules[{index}]"
        rule = _dict(each, place)
        action = str(rule.get("action"))
        if action not in ACTIONS:
            raise ConfigError(f"{place}.action: {expected_one_of(ACTIONS, action)}")
        reasons = frozenset(map(str, _at(rule, "onJobFailureReasons", list, place)))
        yield FailureRule(action=action, targets=_names(rule, "targetReplicatedJobs", place, jobs), reasons=reasons)


def _names(node: Node, key: str, place: str, jobs: tuple[ReplicatedJob, ...]) -> frozenset[str]:
    known = [job.name for job in jobs]
    names = [str(name) for name in _at(node, key, list, place)]
    for name in names:
        if name not in known:
            raise ConfigError(f"{place}.{key}: {expected_one_of(known, name)}")
    return frozenset(names)


def _left_out(spec: Node, jobs: tuple[ReplicatedJob, ...]) -> Iterator[str]:
    for job in spec["replicatedJobs"]:
        template = job["template"]["spec"]
        pod = template["template"]["spec"]
        yield from (text for key, text in POD_PARTS.items() if pod.get(key))
        yield from (text for key, text in CONTAINER_PARTS.items() if pod["containers"][0].get(key))
        if pod.get("volumes"):
            yield "volumes (their paths are folders of this machine)"
        if len(pod["containers"]) > 1:
            yield "containers after the first of a pod"
        if job.get("dependsOn"):
            yield "dependsOn"
    if _at(spec, "startupPolicy", dict, "spec"):
        yield "startupPolicy"
    if spec.get("suspend"):
        yield "suspend"
    rules = _at(_at(spec, "failurePolicy", dict, "spec"), "rules", list, "spec.failurePolicy")
    if any(rule.get("onJobFailureMessagePatterns") for rule in rules):
        yield "onJobFailureMessagePatterns"
    if any("RestartJob" in str(rule.get("action")) for rule in rules) and any(job.layout.pods > 1 for job in jobs):
        yield "RestartJob for the other pods of a Job"


def _count(node: Node, key: str, default: int, place: str) -> int:
    value = node.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{place}: {key}: expected a number, 0 or more, got {value!r}")
    return value


def _at(node: Node, key: str, kind: type, place: str) -> Any:
    """Return a part of a node, an empty one if it is missing."""
    value = node.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ConfigError(f"{place}: {key}: expected {'a list' if kind is list else 'an object'}, got {value!r}")
    return value


def _dict(node: object, place: str) -> Node:
    if not isinstance(node, dict):
        raise ConfigError(f"{place}: expected an object, got {node!r}")
    return node
