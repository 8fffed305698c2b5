"""The pods of a JobSet as tasks on this machine: JobSet -> `LaunchSpec`. No process, file or environment here.

Rules
    * A pod has the environment that JobSet and Kubernetes would give it, with ``$(NAME)`` replaced, and below it the
      threads and the settings of malloc that a launched run has: all pods share the cores of one machine.
    * Each ps listens on a port of the loopback address. Its name in the cluster, ``<pod>.<subdomain>:<port>``, is
      replaced by that address, in the environment and, by PARAMSERVER_POD_ADDRESSES, in what JobSet's resolver says.
    * The commands ``paramserver`` and ``python`` of the image are those of this interpreter.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from paramserver.cluster.jobset import COMPLETION_INDEX, LABELS, POD_ADDRESSES
from paramserver.cluster.task import Role
from paramserver.errors import ConfigError
from paramserver.launch.jobsets.jobset import JobSet, Pod
from paramserver.launch.lifecycle import Limits
from paramserver.launch.spec import HOST, NO_PORT, LaunchSpec, TaskSpec

NAMESPACE = "jobset.sigs.k8s.io"
REFERENCE = re.compile(r"\$(\$?)\(([-._A-Za-z][-._A-Za-z0-9]*)\)")
FIELD = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
PYTHON = re.compile(r"python(3(\.\d+)?)?")
TOKEN = "PARAMSERVER_TOKEN"  # noqa: S105  # the name of a variable


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine gives to the pods.

    Attributes:
        run_id: The id of the run; the uid of the JobSet.
        token: The secret for a run whose Secret is not in the manifest.
        python: The interpreter.
        ports: The listening port of each ps; None if it is not chosen yet.
        runtime: Variables for threads and malloc.
        mounts: Folders of this machine by the paths in a pod that stand for them.
        environment: The launcher's own variables, for Secrets that are not in the manifest.
    """

    run_id: str
    token: str
    python: str
    ports: Sequence[int | None]
    runtime: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def plan(jobset: JobSet, machine: Machine, limits: Limits) -> LaunchSpec:
    """Return the run of a JobSet.

    Raises:
        ConfigError: If a command is not on this machine, a variable has no value, or a volume no folder.
    """
    pods = list(jobset.pods())
    addresses = _addresses(jobset, pods, machine.ports)
    tasks = tuple(_task(jobset, pod, addresses, machine) for pod in pods)
    listening = tuple(addresses[_name(jobset, pod)] for pod in pods if pod.task.role is Role.PS)
    can_fork = all(task.command[:2] == (machine.python, "-m") for task in tasks)
    return LaunchSpec(
        machine.run_id,
        tasks,
        {Role.PS.value: listening},
        limits=limits,
        start_method="forkserver" if can_fork else "spawn",
    )


def _name(jobset: JobSet, pod: Pod) -> str:
    return f"{jobset.host(pod)}:{pod.job.port}"


def _addresses(jobset: JobSet, pods: Sequence[Pod], ports: Sequence[int | None]) -> dict[str, str]:
    names = [_name(jobset, pod) for pod in pods if pod.task.role is Role.PS]
    return {name: f"{HOST}:{NO_PORT if port is None else port}" for name, port in zip(names, ports, strict=True)}


def _task(jobset: JobSet, pod: Pod, addresses: Mapping[str, str], machine: Machine) -> TaskSpec:
    def here(text: str) -> str:
        for name, address in addresses.items():
            text = text.replace(name, address)
        return moved(text, machine.mounts)

    own = {name: here(value) for name, value in environment_of(jobset, pod, machine).items()}
    command = _command([here(expanded(each, own)) for each in pod.job.command], pod, machine.python)
    env = {
        "HOSTNAME": pod.hostname,
        COMPLETION_INDEX: str(pod.pod_index),
        **machine.runtime,
        **own,
        POD_ADDRESSES: json.dumps(addresses),
    }
    return TaskSpec(pod.task, command, env)


def environment_of(jobset: JobSet, pod: Pod, machine: Machine) -> dict[str, str]:
    """Return the variables of a pod's container, as its manifest says."""
    env: dict[str, str] = {COMPLETION_INDEX: str(pod.pod_index)}
    for variable in pod.job.env:
        name = str(variable.get("name"))
        source = variable.get("valueFrom")
        if source is None:
            env[name] = expanded(str(variable.get("value") or ""), env)
        elif (value := _value(name, source, jobset, pod, machine)) is not None:
            env[name] = value
    return env


def expanded(text: str, env: Mapping[str, str]) -> str:
    """Replace ``$(NAME)`` as Kubernetes does: unknown names stay, and ``$$(NAME)`` stands for ``$(NAME)``.

    >>> expanded("$(A)/$(B) $$(A)", {"A": "1"})
    '1/$(B) $(A)'
    """
    return REFERENCE.sub(lambda found: found[0][1:] if found[1] else env.get(found[2], found[0]), text)


def moved(text: str, mounts: Mapping[str, str]) -> str:
    """Replace a path in a pod by the folder that stands for it.

    >>> moved("--model-dir=/model/a", {"/model": "/tmp/run"}), moved("/models", {"/model": "/tmp/run"})
    ('--model-dir=/tmp/run/a', '/models')
    """
    for path, folder in mounts.items():
        text = re.sub(rf"(^|=){re.escape(path.rstrip('/'))}(?=/|$)", lambda found: found[1] + folder, text)  # noqa: B023
    return text


def labels_of(jobset: JobSet, pod: Pod, run_id: str) -> dict[str, str]:
    """Return the labels that JobSet and Kubernetes give a pod, which are its annotations, too."""
    return {
        LABELS["JOBSET_NAME"]: jobset.name,
        f"{NAMESPACE}/jobset-uid": run_id,
        LABELS["REPLICATED_JOB_NAME"]: pod.job.name,
        f"{NAMESPACE}/replicatedjob-replicas": str(pod.job.layout.jobs),
        f"{NAMESPACE}/global-replicas": str(sum(job.layout.jobs for job in jobset.jobs)),
        LABELS["JOB_INDEX"]: str(pod.job_index),
        f"{NAMESPACE}/restart-attempt": "0",
        "batch.kubernetes.io/job-completion-index": str(pod.pod_index),
    }


def _value(name: str, source: Mapping[str, Any], jobset: JobSet, pod: Pod, machine: Machine) -> str | None:
    if "fieldRef" in source:
        return _field(name, str(source["fieldRef"].get("fieldPath")), jobset, pod, machine.run_id)
    if "secretKeyRef" in source:
        reference = source["secretKeyRef"]
        secret, key = str(reference.get("name")), str(reference.get("key"))
        value = jobset.secrets.get(secret, {}).get(key) or machine.environment.get(name)
        if value is None and name == TOKEN:
            return machine.token
        if value is not None or reference.get("optional"):
            return value
        raise ConfigError(
            f"env {name} of {pod.task}: expected the Secret {secret!r} with the key {key!r} in the file; "
            f"add it, or set {name} for this command"
        )
    value = machine.environment.get(name)
    if value is None:
        raise ConfigError(
            f"env {name} of {pod.task}: {', '.join(source)} has no value on this machine; set {name} for this command"
        )
    return value


def _field(name: str, path: str, jobset: JobSet, pod: Pod, run_id: str) -> str:
    values = {
        "metadata.name": f"{pod.hostname}-local",
        "metadata.namespace": jobset.namespace,
        "metadata.uid": f"{run_id}-{pod.hostname}",
        "status.podIP": HOST,
        "status.hostIP": HOST,
        "spec.nodeName": "localhost",
    }
    if found := FIELD.fullmatch(path):
        given = pod.job.labels if found[1] == "labels" else pod.job.annotations
        return {**given, **labels_of(jobset, pod, run_id)}.get(found[2], "")
    if path not in values:
        raise ConfigError(f"env {name} of {pod.task}: the field {path!r} has no value on this machine")
    return values[path]


def _command(words: Sequence[str], pod: Pod, python: str) -> tuple[str, ...]:
    program, *arguments = words
    name = PurePath(program).name
    if name == "paramserver":
        return (python, "-m", "paramserver", *arguments)
    if PYTHON.fullmatch(name):
        return (python, *arguments)
    if shutil.which(program) is None:
        raise ConfigError(
            f"command of {pod.task}: there is no {program!r} on this machine, where the image is not used; in a "
            "cluster, an image without it says: executable file not found in $PATH"
        )
    return tuple(words)
