"""Manifests against the real definitions of what they describe, and their pods against the schemas of Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.launch.manifest_cases import CASES, text

jsonschema = pytest.importorskip("jsonschema", reason="make test-kubernetes installs it")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="make test-kubernetes installs it")

pytestmark = pytest.mark.kubernetes

DEFINITIONS = next(
    (folder / "shared/crds" for folder in Path(__file__).parents if (folder / "shared/crds").is_dir()), None
)
FILES = {
    "JobSet": "jobsets.yaml",
    "ClusterTrainingRuntime": "clustertrainingruntimes.yaml",
    "TrainJob": "trainjobs.yaml",
    "TFJob": "tfjobs.yaml",
}
VERSIONS = ("1.31", "1.37")
"""Of Kubernetes: the first in which failure policies of pods are stable, and the newest."""


def loaded(name: str) -> list[Any]:
    return list(yaml.safe_load_all(text(name)))


CUSTOM = [(name, each["kind"]) for name in CASES for each in loaded(name) if each["kind"] in FILES]


def schema_of(definition: Any, version: str) -> Any:
    """The JSON schema of a version of a custom resource."""
    (found,) = [each for each in definition["spec"]["versions"] if each["name"] == version]
    return as_json_schema(found["schema"]["openAPIV3Schema"], is_root=True)


def as_json_schema(schema: Any, *, is_root: bool = False) -> Any:
    """A structural schema of Kubernetes as a JSON schema that refuses unknown fields, as the API server would."""
    if isinstance(schema, list):
        return [as_json_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **{k: v for k, v in schema.items() if k == "pattern"}}
    converted = {k: as_json_schema(v) for k, v in schema.items() if k not in ("properties", "default", "format")}
    if "properties" in schema:
        converted["properties"] = {name: as_json_schema(each) for name, each in schema["properties"].items()}
        if is_root:
            converted["properties"]["metadata"] = {"type": "object"}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            converted["additionalProperties"] = False
    return converted


def jobs(manifest: Any) -> Iterator[Any]:
    """The templates of Jobs in a JobSet or in the template of one."""
    spec = manifest["spec"]["template"]["spec"] if manifest["kind"] == "ClusterTrainingRuntime" else manifest["spec"]
    yield from (job["template"] for job in spec["replicatedJobs"])


def pod_templates(manifest: Any) -> Iterator[Any]:
    if manifest["kind"] in ("JobSet", "ClusterTrainingRuntime"):
        yield from (job["spec"]["template"] for job in jobs(manifest))
    elif manifest["kind"] == "TFJob":
        yield from (replica["template"] for replica in manifest["spec"]["tfReplicaSpecs"].values())
    elif manifest["kind"] == "Job":  # Volcano's
        yield from (task["template"] for task in manifest["spec"]["tasks"])


@pytest.mark.skipif(DEFINITIONS is None, reason="there is no folder shared/crds beside the checkout")
@pytest.mark.parametrize(("name", "kind"), CUSTOM)
def test_a_manifest_is_valid_by_the_definition_of_its_kind(name: str, kind: str) -> None:
    assert DEFINITIONS is not None
    definition = yaml.load((DEFINITIONS / FILES[kind]).read_bytes(), yaml.CSafeLoader)
    (manifest,) = [each for each in loaded(name) if each["kind"] == kind]
    group, version = manifest["apiVersion"].split("/")
    assert group == definition["spec"]["group"]
    schema = schema_of(definition, version)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["replicas"] = "none"  # a field that no kind has there
    with pytest.raises(jsonschema.ValidationError, match="replicas"):
        jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_pods_jobs_and_secrets_are_valid_for_kubernetes(name: str, version: str) -> None:
    core = [each for each in loaded(name) if each["kind"] == "Secret"]
    for manifest in loaded(name):
        pods = list(pod_templates(manifest))
        core += [
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "n"}, "template": pod} for pod in pods
        ]
        if manifest["kind"] in ("JobSet", "ClusterTrainingRuntime"):
            core += [
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "n"}} | job for job in jobs(manifest)
            ]
    assert core
    for each in core:
        kubernetes_validate.validate(each, version, strict=True)


def test_a_pod_with_a_misspelt_field_is_refused() -> None:
    (manifest,) = loaded("jobset")
    (first, *_) = pod_templates(manifest)
    first["spec"]["terminationGracePeriod"] = 1
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "n"}, "template": first}
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(pod, VERSIONS[0], strict=True)
