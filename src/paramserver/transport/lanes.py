"""The kinds of lane that a task can use; see `layout.lanes` for their names."""

from __future__ import annotations

from paramserver.errors import ConfigError, RefusedError
from paramserver.layout.lanes import AUTO, AUTOMATIC, find_lane, lane_names
from paramserver.transport.lane import LaneKind, WorkerMemory


def lane_kind(name: str) -> LaneKind:
    """Return the kind of lane of this name.

    Raises:
        ConfigError: If no installed package has a lane of this name, or its entry is not a `LaneKind`.
    """
    found = find_lane(name)
    kind = found.load() if found else None
    if not isinstance(kind, LaneKind):
        what = f"{found.value} is not a LaneKind" if found else f"expected one of {', '.join(lane_names())}"
        raise ConfigError(f"lane {name!r}: {what}")
    return kind


def usable_lanes(choice: str, kept: WorkerMemory | None) -> dict[str, LaneKind]:
    """Return the kinds of lane to try for a choice, by name, in the order of preference.

    Args:
        choice: The name of a lane, or ``auto``.
        kept: The memory of an earlier lane to go on with, if any.

    Raises:
        ConfigError: If there is no lane of this name.
        RefusedError: If this machine cannot use the lane, or the lane cannot go on with that memory.
    """
    kinds = {name: lane_kind(name) for name in (AUTOMATIC if choice == AUTO else (choice,))}
    usable = {name: kind for name, kind in kinds.items() if not kind.obstacle() and (kept is None or kind.keeps(kept))}
    if not usable:
        obstacle = kinds[choice].obstacle() or "it cannot go on with the memory of the lane that was lost"
        raise RefusedError(f"a {choice} lane cannot be used here: {obstacle}", choice)
    return usable
