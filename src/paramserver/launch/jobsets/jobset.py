"""A JobSet as data: what of its manifest matters to a run on one machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paramserver.cluster.jobset import PORT, Layout, pod_names
from paramserver.cluster.task import Role, TaskId

BACKOFF_LIMIT = 6
"""Failures of a Job's pods after which it has failed, unless its manifest says otherwise; as in Kubernetes."""


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """A rule of a Job's ``podFailurePolicy``.

    Attributes:
        action: ``Ignore``, ``Count`` or ``FailJob``.
        codes: The exit codes.
        is_negated: Whether the rule is for all other codes but 0.
    """

    action: str
    codes: frozenset[int]
    is_negated: bool = False

    def matches(self, code: int) -> bool:
        """Return whether the rule is for an exit code."""
        return (code in self.codes) != self.is_negated


@dataclass(frozen=True, kw_only=True)
class FailureRule:
    """A rule of the JobSet's ``failurePolicy``.

    Attributes:
        action: What is done, such as ``RestartJob``.
        targets: The replicated jobs that it is for; empty for all.
        reasons: The reasons of a failure that it is for; empty for all.
    """

    action: str
    targets: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()

    def matches(self, job: str, reason: str) -> bool:
        """Return whether the rule is for a failed Job of a replicated job."""
        return (not self.targets or job in self.targets) and (not self.reasons or reason in self.reasons)


@dataclass(frozen=True, kw_only=True)
class ReplicatedJob:
    """A replicated job: the pods of a role.

    Attributes:
        name: Its name.
        role: The role that the name says.
        layout: Its Jobs and pods.
        command: The command of the container, with its arguments.
        env: The variables of the container, as in the manifest.
        labels: The labels of the pods, without those that JobSet adds.
        annotations: The annotations, likewise.
        mounts: Where volumes are mounted.
        port: The port that a ps listens on.
        backoff_limit: Number of failures of a Job's pods that do not fail the Job.
        exit_rules: The rules of ``podFailurePolicy`` about exit codes.
        grace: Seconds that a pod gets to end after it was told to.
    """

    name: str
    role: Role
    layout: Layout
    command: tuple[str, ...]
    env: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()
    port: int = PORT
    backoff_limit: int = BACKOFF_LIMIT
    exit_rules: tuple[ExitRule, ...] = ()
    grace: float = 30.0


class Pod(NamedTuple):
    """One pod of a JobSet.

    Attributes:
        task: The task that runs in it.
        job: Its replicated job.
        job_index: The index of its Job.
        pod_index: Its index in its Job.
        hostname: The first part of its name.
    """

    task: TaskId
    job: ReplicatedJob
    job_index: int
    pod_index: int
    hostname: str


@dataclass(frozen=True, kw_only=True)
class JobSet:
    """A JobSet.

    Attributes:
        name: Its name.
        namespace: Its namespace.
        subdomain: The last part of the names of its pods.
        jobs: Its replicated jobs.
        success_operator: ``All`` or ``Any`` of the target Jobs have to complete.
        success_targets: The replicated jobs whose Jobs count; empty for all.
        max_restarts: Number of restarts that count; None without a failure policy, where each failure ends the JobSet.
        rules: The rules of the failure policy.
        secrets: Values by Secret and key, of the Secrets in the same file.
        left_out: What the manifest asks for and does not happen on one machine.
    """

    name: str
    namespace: str = "default"
    subdomain: str
    jobs: tuple[ReplicatedJob, ...]
    success_operator: str = "All"
    success_targets: frozenset[str] = frozenset()
    max_restarts: int | None = None
    rules: tuple[FailureRule, ...] = ()
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def pods(self) -> Iterator[Pod]:
        """Yield all pods, those of ps tasks first, so that workers find them."""
        for job in sorted(self.jobs, key=lambda job: job.role is not Role.PS):
            for index, hostname in enumerate(pod_names(self.name, job.name, job.layout)):
                job_index, pod_index = divmod(index, job.layout.pods)
                yield Pod(TaskId(job.role, index), job, job_index, pod_index, hostname)

    def host(self, pod: Pod) -> str:
        """Return the name by which other pods reach a pod."""
        return f"{pod.hostname}.{self.subdomain}"
