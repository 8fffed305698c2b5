"""A TFJob of Kubeflow's training operator (v1), which sets TF_CONFIG by itself."""

from __future__ import annotations

from paramserver.cluster.task import Role
from paramserver.launch.manifests.options import ManifestOptions
from paramserver.launch.manifests.pods import Object, metadata, pod_spec

REPLICA_TYPES = {Role.PS: "PS", Role.CHIEF: "Chief", Role.WORKER: "Worker", Role.EVALUATOR: "Evaluator"}
CONTAINER, PORT_NAME = "tensorflow", "tfjob-port"
"""The names by which the operator finds the container and its port."""


def objects(options: ManifestOptions) -> list[Object]:
    """Return the TFJob. It succeeds with its chief.

    Pods that still run then are deleted, but not if there is an evaluator, which still evaluates the last checkpoint:
    all tasks end by themselves.
    """
    clean = "None" if options.evaluator else "Running"
    return [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "TFJob",
            "metadata": metadata(options),
            "spec": {
                "runPolicy": {"cleanPodPolicy": clean, "backoffLimit": options.restarts},
                "tfReplicaSpecs": {
                    REPLICA_TYPES[Role(job)]: _replica(options, Role(job), layout.jobs)
                    for job, layout in options.jobs.items()
                },
            },
        }
    ]


def _replica(options: ManifestOptions, role: Role, count: int) -> Object:
    # OnFailure, and not ExitCode, which takes every code below 128 for final, 75 too.
    restart_policy = "OnFailure"
    pod = pod_spec(options, role, container=CONTAINER, restart_policy=restart_policy)
    (container,) = pod["containers"]
    container["ports"] = [{"name": PORT_NAME, "containerPort": options.port}]  # for the addresses in TF_CONFIG
    return {"replicas": count, "restartPolicy": restart_policy, "template": {"spec": pod}}
