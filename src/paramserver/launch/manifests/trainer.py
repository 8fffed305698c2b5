"""Kubeflow Trainer: a ClusterTrainingRuntime, whose template is the JobSet, and a TrainJob that uses it.

Trainer hands the options of a TrainJob to one replicated job only, the one with the label of an ancestor. Here that is
the chief, which there is always one of. So the program and the numbers of tasks are part of the runtime.
"""

from __future__ import annotations

from paramserver.launch.manifests import jobset
from paramserver.launch.manifests.options import ManifestOptions
from paramserver.launch.manifests.pods import Object, metadata

API = "trainer.kubeflow.org/v1alpha1"
ANCESTOR = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
NODE = "node"
"""The name that Trainer expects of the container with that label."""


def objects(options: ManifestOptions) -> list[Object]:
    """Return the runtime, which belongs to no namespace, and the TrainJob."""
    name = f"{options.name}-runtime"
    return [
        {
            "apiVersion": API,
            "kind": "ClusterTrainingRuntime",
            "metadata": {
                **metadata(options, name, is_namespaced=False),
                "labels": {"trainer.kubeflow.org/framework": "paramserver"},
            },
            "spec": {
                "mlPolicy": {"numNodes": 1},
                "template": {"spec": jobset.spec(options, chief=ANCESTOR, chief_container=NODE)},
            },
        },
        {
            "apiVersion": API,
            "kind": "TrainJob",
            "metadata": metadata(options),
            "spec": {
                "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": name}
            },
        },
    ]
