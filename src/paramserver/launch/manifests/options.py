"""The options of a manifest, checked before anything is built.

Rules
    * Names become parts of host names. JobSet makes the longest, ``<name>-<role>-<index>-0-<five letters>``, which has
      to fit into a DNS label; the other kinds take the same limit.
    * Requests and limits of resources are equal: a task takes its number of threads from its CPU limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from paramserver.cluster.addresses import LAST_PORT
from paramserver.cluster.jobset import PORT, Layout, pod_names
from paramserver.cluster.roles import parse_role
from paramserver.cluster.task import Role
from paramserver.errors import ConfigError

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A DNS label that begins with a letter, as the names of Services do."""
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LONGEST_LABEL = 63
SUFFIX = "-abcde"
"""What Kubernetes appends to the name of a pod of a Job."""

QUANTITY = re.compile(r"(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
DEFAULT_RESOURCES = {"cpu": "2", "memory": "4Gi"}

PODS = "pods"
JOBS = "jobs"
RESTART_WITH = (PODS, JOBS)
"""Who starts a task again: its Job makes a new pod, or JobSet makes a new Job."""

MOUNT = "/model"
"""Where a persistent volume is mounted."""


@dataclass(frozen=True, kw_only=True)
class ManifestOptions:
    """The options of a manifest.

    Attributes:
        image: The image of all pods; it has the package, the script and what the script needs.
        script: The program, as `launch.spec.LaunchOptions.script`.
        args: The arguments of the script. Kubernetes replaces ``$(MODEL_DIR)`` in them.
        is_module: Whether ``script`` is the name of a module.
        ps: Number of parameter servers.
        workers: Number of tasks that train, including the chief.
        evaluator: Whether there is an evaluator.
        name: The name of the run, from which all other names are made.
        namespace: The namespace of the objects; None for that of kubectl.
        port: The port of each ps.
        restarts: How often a task that has failed is started again.
        restart_with: One of `RESTART_WITH`; for a JobSet.
        resources: CPU, memory and others of each role; `DEFAULT_RESOURCES` for those that are missing.
        pvc: The name of a PersistentVolumeClaim for ``model_dir``, which chief and evaluator mount.
        model_dir: A path or URL instead; the value of MODEL_DIR.
        shutdown_timeout: Seconds that a task gets to end after it was told to.
        token: The secret of the run, if it shall be part of the manifest.
    """

    image: str
    script: str
    args: tuple[str, ...] = ()
    is_module: bool = False
    ps: int = 1
    workers: int = 1
    evaluator: bool = False
    name: str = "paramserver"
    namespace: str | None = None
    port: int = PORT
    restarts: int = 3
    restart_with: str = PODS
    resources: Mapping[Role, Mapping[str, str]] = field(default_factory=dict)
    pvc: str | None = None
    model_dir: str | None = None
    shutdown_timeout: int = 30
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("image", "script"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name}: expected one, got an empty text")
        for name, least in (("ps", 1), ("workers", 1), ("restarts", 0), ("shutdown_timeout", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not 0 < self.port <= LAST_PORT:
            raise ConfigError(f"port: expected a number from 1 to {LAST_PORT}, got {self.port}")
        if self.restart_with not in RESTART_WITH:
            raise ConfigError(f"restart with: expected one of {', '.join(RESTART_WITH)}, got {self.restart_with!r}")
        if self.pvc is not None and self.model_dir is not None:
            raise ConfigError("pvc, model_dir: expected one of them; a claim is mounted at " + MOUNT)
        self._check_names()

    def _check_names(self) -> None:
        _check_name("name", self.name, LABEL)
        if self.namespace is not None:
            _check_name("namespace", self.namespace, LABEL)
        if self.pvc is not None:
            _check_name("pvc", self.pvc, SUBDOMAIN, longest=253)
        longest = max((pod_names(self.name, job, layout)[-1] for job, layout in self.jobs.items()), key=len) + SUFFIX
        if len(longest) > LONGEST_LABEL:
            excess = len(longest) - LONGEST_LABEL
            raise ConfigError(
                f"name: {self.name!r} makes the name {longest!r} of a pod, which has {len(longest)} characters instead "
                f"of at most {LONGEST_LABEL}; shorten it by {excess}"
            )

    @property
    def jobs(self) -> dict[str, Layout]:
        """The pods by role: each is the only one of a Job, so that it can be started again alone."""
        counts = {Role.PS: self.ps, Role.CHIEF: 1, Role.WORKER: self.workers - 1, Role.EVALUATOR: int(self.evaluator)}
        return {role.value: Layout(count) for role, count in counts.items() if count}

    @property
    def secret_name(self) -> str:
        """The name of the Secret that holds the token, under the key ``token``."""
        return f"{self.name}-token"

    @property
    def task_arguments(self) -> list[str]:
        """The arguments of ``paramserver task``."""
        return [*(["-m"] if self.is_module else []), self.script, *self.args]

    def resources_of(self, role: Role) -> dict[str, str]:
        """Return the resources of a role."""
        return {**DEFAULT_RESOURCES, **self.resources.get(role, {})}

    def notes(self, kind: str) -> list[str]:
        """Return lines about what the manifest needs, for its reader."""
        lines = [f"Made by `paramserver manifest {kind}`: {', '.join(f'{job}={n}' for job, n in self.jobs.items())}."]
        if self.token is None:
            namespace = f" -n {self.namespace}" if self.namespace else ""
            lines += [
                "Make the secret of the run first:",
                f"  kubectl create secret generic {self.secret_name}{namespace} "
                "--from-literal=token=\"$(python -c 'import secrets; print(secrets.token_hex(32))')\"",
            ]
        else:
            lines.append("It holds the secret of the run: keep it to yourself.")
        if self.pvc is None and self.model_dir is None:
            lines.append("Without --pvc or --model-dir, checkpoints are lost with the pod of the chief.")
        return lines


def parse_resources(texts: Iterable[str]) -> dict[Role, dict[str, str]]:
    """Return the resources of each role, from texts such as ``ps:cpu=2,memory=8Gi``; without a role, of all.

    Raises:
        ConfigError: If a text is malformed, or there is no such role.

    >>> parse_resources(["cpu=2", "ps:memory=8Gi"])[Role.PS]
    {'cpu': '2', 'memory': '8Gi'}
    """
    resources: dict[Role, dict[str, str]] = {role: {} for role in Role}
    for text in texts:
        role, colon, amounts = text.rpartition(":")
        found = dict(_amount(item, text) for item in amounts.split(","))
        for each in [parse_role(role)] if colon else Role:
            resources[each] |= found
    return resources


def _amount(item: str, text: str) -> tuple[str, str]:
    name, _, quantity = (part.strip() for part in item.partition("="))
    if not (name and QUANTITY.fullmatch(quantity)):
        raise ConfigError(f"resources: expected ROLE:NAME=QUANTITY,... such as 'ps:cpu=2,memory=8Gi', got {text!r}")
    return name, quantity


def _check_name(what: str, name: str, pattern: re.Pattern[str], longest: int = LONGEST_LABEL) -> None:
    if not pattern.fullmatch(name) or len(name) > longest:
        dots = ", with dots between such parts" if pattern is SUBDOMAIN else ""
        raise ConfigError(
            f"{what}: expected at most {longest} small letters, digits and '-', from a letter to a letter or "
            f"digit{dots}, got {name!r}"
        )
