"""A JobSet: a replicated job for each role, whose Jobs have one pod each, so that each task is started again alone."""

from __future__ import annotations

from typing import Any

from paramserver.cluster.jobset import JOBS, LABELS, PS_PORT
from paramserver.cluster.task import Role
from paramserver.launch.manifests.options import JOBS as WITH_JOBS
from paramserver.launch.manifests.options import ManifestOptions
from paramserver.launch.manifests.pods import (
    Object,
    from_label,
    metadata,
    pod_failure_policy,
    pod_spec,
    variable,
)

UID = "jobset.sigs.k8s.io/jobset-uid"


def objects(options: ManifestOptions) -> list[Object]:
    """Return the JobSet."""
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata(options),
            "spec": spec(options),
        }
    ]


def spec(options: ManifestOptions, *, chief: Object | None = None, chief_container: str = "task") -> Object:
    """Return the specification of the JobSet.

    The evaluator's success is needed, too, if there is one: JobSet stops all others when its success policy is
    fulfilled, and the evaluator still evaluates the last checkpoint when the chief has finished.

    Args:
        options: The options of the manifest.
        chief: The metadata of the chief's Job.
        chief_container: The name of the chief's container.
    """
    roles = [Role(job) for job in options.jobs]
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {
            "operator": "All",
            "targetReplicatedJobs": [role.value for role in roles if role in (Role.CHIEF, Role.EVALUATOR)],
        },
        "failurePolicy": _failure_policy(options),
        "replicatedJobs": [
            _replicated_job(options, role, chief, chief_container)
            if role is Role.CHIEF
            else _replicated_job(options, role)
            for role in roles
        ],
    }


def _failure_policy(options: ManifestOptions) -> Object:
    """Return the consequences of a Job that has failed for good.

    With a new pod for each failure, Jobs count failures, and one that has failed too often ends the JobSet. With a new
    Job for each failure, a Job fails with its pod, and the JobSet counts.
    """
    if options.restart_with != WITH_JOBS:
        return {"maxRestarts": 0}
    rule = {"name": "taskAlone", "action": "RestartJob", "targetReplicatedJobs": list(options.jobs)}
    return {"maxRestarts": options.restarts, "rules": [rule]}


def _replicated_job(
    options: ManifestOptions, role: Role, job_metadata: Object | None = None, container: str = "task"
) -> Object:
    template: dict[str, Any] = {} if job_metadata is None else {"metadata": job_metadata}
    template["spec"] = {
        "parallelism": 1,
        "completions": 1,
        "completionMode": "Indexed",
        "backoffLimit": 0 if options.restart_with == WITH_JOBS else options.restarts,
        "podFailurePolicy": pod_failure_policy(),
        "template": {"spec": pod_spec(options, role, _identity(options), container=container)},
    }
    return {"name": role.value, "replicas": options.jobs[role].jobs, "template": template}


def _identity(options: ManifestOptions) -> list[Object]:
    counts = ",".join(f"{job}={layout}" for job, layout in options.jobs.items())
    return [
        *(from_label(name, label) for name, label in LABELS.items()),
        variable(JOBS, counts),
        variable(PS_PORT, options.port),
        from_label("PARAMSERVER_RUN_ID", UID),
    ]
