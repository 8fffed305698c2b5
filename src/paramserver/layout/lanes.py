"""The kinds of lane by name: one row each.

A lane moves bytes between a worker and a ps. Lanes of other packages are found by the entry point `GROUP`: the name of
an entry is the name of a lane, its value names a `transport.lane.LaneKind`. Importing this file imports no lane, so the
launcher can check a name without waiting for torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

from paramserver.errors import ConfigError

GROUP = "paramserver.lanes"
AUTO = "auto"
"""Not a lane, but a choice: the first of `AUTOMATIC` that leads to the ps."""
AUTOMATIC = ("shared-memory", "tcp")

_BUILT_IN = {
    "shared-memory": "paramserver.transport.shared_memory:KIND",
    "tcp": "paramserver.transport.tcp:KIND",
}


def lane_names() -> tuple[str, ...]:
    """Return the names by which a lane can be chosen: built-in ones first, then those of installed packages.

    >>> lane_names()[:3]
    ('auto', 'shared-memory', 'tcp')
    """
    others = sorted(point.name for point in entry_points(group=GROUP))
    return (AUTO, *_BUILT_IN, *others)


def check_lane(name: str, setting: str) -> None:
    """Check that ``name`` chooses a lane.

    Args:
        name: The name to check.
        setting: The origin of the name, for messages.

    Raises:
        ConfigError: If no lane has this name.

    >>> check_lane("rdma", "--lane")
    Traceback (most recent call last):
    paramserver.errors.ConfigError: --lane: expected one of auto, shared-memory, tcp, got 'rdma'
    """
    if name != AUTO and name not in _BUILT_IN and name not in (names := lane_names()):
        raise ConfigError(f"{setting}: expected one of {', '.join(names)}, got {name!r}")


def check_platform(what: str) -> None:
    """Check that this system can have several tasks; one process needs none of what is checked here.

    Args:
        what: What needs several tasks, for messages.

    Raises:
        ConfigError: If it is not Linux.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"{what}: Linux only (on Windows: WSL 2), and this is {sys.platform}; training in one process works here: "
            "run the program without TF_CONFIG"
        )


def find_lane(name: str) -> EntryPoint | None:
    """Return the entry point of the lane of this name; None if no installed package has such a lane."""
    if name in _BUILT_IN:
        return EntryPoint(name, _BUILT_IN[name], GROUP)
    return next(iter(entry_points(group=GROUP, name=name)), None)
