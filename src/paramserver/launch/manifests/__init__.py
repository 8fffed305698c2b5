"""Manifests for Kubernetes, as data: options -> list of objects -> YAML. No file, process or environment here.

``KINDS`` has a row for each kind of manifest. All of them run the same command in every pod, ``paramserver task``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from paramserver.cluster.spec import expected_one_of
from paramserver.errors import ConfigError
from paramserver.launch.manifests import jobset, tfjob, trainer, volcano
from paramserver.launch.manifests.options import ManifestOptions
from paramserver.launch.manifests.pods import Object, secret
from paramserver.launch.manifests.text import as_yaml

Build: TypeAlias = Callable[[ManifestOptions], list[Object]]

KINDS: dict[str, Build] = {
    "jobset": jobset.objects,
    "trainer": trainer.objects,
    "tfjob": tfjob.objects,
    "volcano": volcano.objects,
}
"""Functions that build the objects of a manifest, by kind."""


def find_kind(kind: str) -> Build:
    """Return the function that builds manifests of a kind.

    Raises:
        ConfigError: If there is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"manifest: {expected_one_of(KINDS, kind)}")
    return KINDS[kind]


def objects(kind: str, options: ManifestOptions) -> list[Object]:
    """Return the objects of a manifest; the Secret of the run is the first one, if there is one.

    Raises:
        ConfigError: If there is no such kind.
    """
    first = [] if options.token is None else [secret(options)]
    return [*first, *find_kind(kind)(options)]


def manifest(kind: str, options: ManifestOptions) -> str:
    """Return a manifest as YAML, with comments that say what it needs.

    Raises:
        ConfigError: If there is no such kind, or PyYAML is not installed.
    """
    return as_yaml(objects(kind, options), options.notes(kind))
