"""The kinds of lane by name: a row each.

A lane moves bytes between a worker and a ps. Those of other packages are found by the entry point `GROUP`, whose names
are the names of lanes and whose values name a `transport.lane.LaneKind`. Importing this file imports none of them, so
that the launcher can check a name without waiting for torch.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from paramserver.errors import ConfigError

GROUP = "paramserver.lanes"
AUTO = "auto"
"""Not a lane: the first of `AUTOMATIC` that leads to the ps."""
AUTOMATIC = ("shared-memory", "tcp")

_BUILT_IN = {
    "shared-memory": "paramserver.transport.shared_memory:KIND",
    "tcp": "paramserver.transport.tcp:KIND",
}


def lane_names() -> tuple[str, ...]:
    """Return the names that a lane can be chosen by: built-in ones first, then those of installed packages.

    >>> lane_names()[:3]
    ('auto', 'shared-memory', 'tcp')
    """
    others = sorted(point.name for point in entry_points(group=GROUP))
    return (AUTO, *_BUILT_IN, *others)


def check_lane(name: str, setting: str) -> None:
    """Check that ``name`` chooses a lane; ``setting`` says for messages where it comes from.

    Raises:
        ConfigError: If it is not the name of one.

    >>> check_lane("rdma", "--lane")
    Traceback (most recent call last):
    paramserver.errors.ConfigError: --lane: expected one of auto, shared-memory, tcp, got 'rdma'
    """
    if name != AUTO and name not in _BUILT_IN and name not in (names := lane_names()):
        raise ConfigError(f"{setting}: expected one of {', '.join(names)}, got {name!r}")


def find_lane(name: str) -> EntryPoint | None:
    """Return where the kind of this name is defined; None if no installed package brings it."""
    if name in _BUILT_IN:
        return EntryPoint(name, _BUILT_IN[name], GROUP)
    return next(iter(entry_points(group=GROUP, name=name)), None)
