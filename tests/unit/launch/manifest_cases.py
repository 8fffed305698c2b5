"""The manifests that have goldens: a row for each."""

from __future__ import annotations

from pathlib import Path

from paramserver.cluster.task import Role
from paramserver.launch.manifests import manifest
from paramserver.launch.manifests.options import ManifestOptions

GOLDENS = Path(__file__).parent / "goldens"

SMALL = ManifestOptions(image="train:1", script="train.py", ps=2, workers=2, name="train")
LARGE = ManifestOptions(
    image="registry.example/team/train:2",
    script="package.train",
    args=("--model-dir", "$(MODEL_DIR)", "--rate", "0.1"),
    is_module=True,
    ps=2,
    workers=3,
    evaluator=True,
    name="recommender",
    namespace="team",
    port=5000,
    restarts=5,
    resources={Role.PS: {"memory": "16Gi"}, Role.WORKER: {"cpu": "4", "nvidia.com/gpu": "1"}},
    pvc="models",
    shutdown_timeout=60,
    token="0123",
)
ON_URL = ManifestOptions(
    image="train:1", script="train.py", restart_with="jobs", model_dir="s3://bucket/run", restarts=2
)

CASES = {
    "jobset": ("jobset", SMALL),
    "jobset-large": ("jobset", LARGE),
    "jobset-jobs": ("jobset", ON_URL),
    "trainer": ("trainer", LARGE),
    "tfjob": ("tfjob", LARGE),
    "volcano": ("volcano", LARGE),
}


def text(name: str) -> str:
    """The manifest of a row, as it is printed."""
    kind, options = CASES[name]
    return manifest(kind, options)
