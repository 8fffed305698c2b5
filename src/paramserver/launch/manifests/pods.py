"""The pods of a manifest: one template for each role, whatever the kind of the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from paramserver.cluster.exit_codes import CONSEQUENCE, INTERRUPTED, TERMINATED
from paramserver.cluster.task import Role
from paramserver.launch.manifests.options import MOUNT, ManifestOptions

Object: TypeAlias = dict[str, Any]
"""An object of Kubernetes, or a part of one, as JSON has it."""

USER = 1000
"""The user and group of all processes; the image needs no entry for it."""

COMMAND = ["paramserver", "task"]

TOKEN = "PARAMSERVER_TOKEN"  # noqa: S105  # the name of a variable
TOKEN_KEY = "token"  # noqa: S105  # the name of a key
MODEL_DIR = "MODEL_DIR"
LINGER = "PARAMSERVER_LINGER"

SPARE = 10
"""Seconds."""

SHARED_MEMORY = {"medium": "Memory", "sizeLimit": "1Gi"}
"""For /dev/shm, where the workers of a DataLoader pass batches; a container has 64 MiB without it."""

NOT_ITS_OWN = [CONSEQUENCE, INTERRUPTED, TERMINATED]
"""Exit codes of a task that has not failed of its own: it lost another one, or was asked to leave."""


def metadata(options: ManifestOptions, name: str | None = None, *, is_namespaced: bool = True) -> Object:
    """Return the metadata of an object."""
    namespace = {"namespace": options.namespace} if options.namespace and is_namespaced else {}
    return {"name": name or options.name, **namespace}


def variable(name: str, value: object) -> Object:
    """Return an environment variable with a value."""
    return {"name": name, "value": str(value)}


def from_label(name: str, label: str) -> Object:
    """Return an environment variable with the value of a label of the pod, by the downward API."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}


def secret(options: ManifestOptions) -> Object:
    """Return the Secret that holds the token of the run."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(options, options.secret_name),
        "type": "Opaque",
        "stringData": {TOKEN_KEY: options.token},
    }


def pod_failure_policy() -> Object:
    """Return the rules by which a Job makes a new pod without counting a failure.

    A pod that a node has lost is not counted, nor a task that ends because of another one or was asked to leave.
    """
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": NOT_ITS_OWN}},
        ]
    }


def pod_spec(
    options: ManifestOptions,
    role: Role,
    env: Sequence[Object] = (),
    *,
    container: str = "task",
    restart_policy: str = "Never",
) -> Object:
    """Return the specification of the pods of a role.

    Args:
        options: The options of the manifest.
        role: The role.
        env: Variables that tell a task who it is, if the engine does not set them.
        container: The name of the container.
        restart_policy: Whether kubelet starts the container again.
    """
    needs_model_dir = options.pvc is not None and role in (Role.CHIEF, Role.EVALUATOR)
    mounts = [{"name": "model", "mountPath": MOUNT}] if needs_model_dir else []
    volumes: list[Object] = (
        [{"name": "model", "persistentVolumeClaim": {"claimName": options.pvc}}] if needs_model_dir else []
    )
    if role is not Role.PS:
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108  # as programs know it
        volumes.append({"name": "shared-memory", "emptyDir": dict(SHARED_MEMORY)})
    resources = options.resources_of(role)
    spec: Object = {
        "restartPolicy": restart_policy,
        "terminationGracePeriodSeconds": _grace(options, role),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": options.image,
                "command": list(COMMAND),
                "args": options.task_arguments,
                "env": [*env, *_common_env(options, role)],
                "resources": {"requests": resources, "limits": resources},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                **(_serving(options) if role is Role.PS else {}),
                **({"volumeMounts": mounts} if mounts else {}),
            }
        ],
    }
    if volumes:
        spec["volumes"] = volumes
    return spec


def _grace(options: ManifestOptions, role: Role) -> int:
    """Return the seconds between SIGTERM and SIGKILL, with some to spare; those of a ps are over last."""
    return options.shutdown_timeout + SPARE * (2 if role is Role.PS else 1)


def _common_env(options: ManifestOptions, role: Role) -> list[Object]:
    token = {"name": TOKEN, "valueFrom": {"secretKeyRef": {"name": options.secret_name, "key": TOKEN_KEY}}}
    where = MOUNT if options.pvc is not None else options.model_dir
    model_dir = [] if where is None else [variable(MODEL_DIR, where)]
    # All pods are told to end at once, and a ps has to serve a chief that still saves.
    linger = [variable(LINGER, _grace(options, Role.CHIEF))] if role is Role.PS else []
    return [token, *model_dir, *linger, variable("PYTHONUNBUFFERED", 1)]


def _serving(options: ManifestOptions) -> Object:
    """Return the parts of a container that serves.

    The probe looks for the listening port in the kernel's table: a connection would be one of a stranger to the ps.
    """
    listening = f":{options.port:04X} 0*:0000 0A"
    return {
        "ports": [{"name": "ps", "containerPort": options.port}],
        "readinessProbe": {
            "exec": {"command": ["grep", "-q", listening, "/proc/net/tcp", "/proc/net/tcp6"]},
            "periodSeconds": 5,
        },
    }
