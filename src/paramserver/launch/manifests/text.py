"""Objects of Kubernetes as YAML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from paramserver.errors import ConfigError

MISSING = "PyYAML is missing: pip install 'paramserver[kubernetes]'"


def as_yaml(objects: Iterable[Any], notes: Sequence[str] = ()) -> str:
    """Return objects as documents of YAML, below notes as comments.

    Raises:
        ConfigError: If PyYAML is not installed.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError(f"manifest: {MISSING}") from error
    # Parts that several objects share would become anchors, which people do not expect in a manifest.
    separate = [json.loads(json.dumps(each)) for each in objects]
    text: str = yaml.safe_dump_all(separate, sort_keys=False, width=120, explicit_start=True)
    return "".join(f"# {line}\n" for line in notes) + text
