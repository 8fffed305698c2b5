"""A Job of Volcano, whose plug-in ``tensorflow`` sets TF_CONFIG, and ``svc`` the names of the pods."""

from __future__ import annotations

from paramserver.cluster.task import Role
from paramserver.launch.manifests.options import ManifestOptions
from paramserver.launch.manifests.pods import Object, metadata, pod_spec


def objects(options: ManifestOptions) -> list[Object]:
    """Return the Job. Its pods start together or not at all; it ends with the chief, or with the evaluator after it."""
    return [
        {
            "apiVersion": "batch.volcano.sh/v1alpha1",
            "kind": "Job",
            "metadata": metadata(options),
            "spec": {
                "schedulerName": "volcano",
                "minAvailable": sum(layout.size for layout in options.jobs.values()),
                "maxRetry": options.restarts,
                "plugins": {
                    "env": [],
                    "svc": ["--publish-not-ready-addresses=true"],
                    "tensorflow": [
                        *(f"--{role}={role}" for role in ("ps", "worker", "chief", "evaluator")),
                        f"--port={options.port}",
                    ],
                },
                "tasks": [_task(options, Role(job), layout.jobs) for job, layout in options.jobs.items()],
            },
        }
    ]


def _task(options: ManifestOptions, role: Role, count: int) -> Object:
    # A container that fails is started again in its pod; only a pod that its node has lost needs a new one.
    policies = [{"event": "PodEvicted", "action": "RestartPod"}]
    if role is (Role.EVALUATOR if options.evaluator else Role.CHIEF):  # the evaluator ends after the chief
        policies.append({"event": "TaskCompleted", "action": "CompleteJob"})
    return {
        "name": role.value,
        "replicas": count,
        "policies": policies,
        "template": {"spec": pod_spec(options, role, restart_policy="OnFailure")},
    }
