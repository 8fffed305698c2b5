"""Values that differ between the replicas of a worker, and values that are equal on several devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from paramserver.distribute.core.nest import map_leaves

T = TypeVar("T")


class DistributedValues(Generic[T]):
    """One value for each replica. Immutable, so that threads may share it.

    Args:
        values: The values, in the order of the replicas.

    Raises:
        ValueError: If ``values`` is empty.
    """

    def __init__(self, values: Sequence[T]) -> None:
        self.values = tuple(values)
        if not self.values:
            raise ValueError(f"{type(self).__name__} must be non-empty: it holds a value for each replica")

    def __repr__(self) -> str:
        lines = "".join(f"\n  {index}: {value!r}" for index, value in enumerate(self.values))
        return f"{type(self).__name__}:{{{lines}\n}}"


class PerReplica(DistributedValues[T]):
    """Values that in general differ between replicas, as `Strategy.run` returns them.

    >>> PerReplica([1, 2]).values
    (1, 2)
    """


class Mirrored(DistributedValues[T]):
    """The same value on several devices.

    >>> Mirrored(["x", "x"])
    Mirrored:{
      0: 'x'
      1: 'x'
    }
    """


def select_replica(replica: int, structure: Any) -> Any:
    """Return a structure as one replica sees it: each distributed value is replaced by the replica's component.

    >>> select_replica(1, {"x": PerReplica([1, 2]), "y": 3})
    {'x': 2, 'y': 3}

    Raises:
        ValueError: If a distributed value has no component for the replica.
    """
    return map_leaves(partial(_component, replica), structure)


def regroup(structures: Sequence[Any]) -> Any:
    """Combine the structures that all replicas returned into one of `PerReplica` leaves.

    A leaf that is the same object on all replicas stays as it is; so does every leaf of a single replica.

    >>> regroup([{"loss": 1.0, "step": None}, {"loss": 2.0, "step": None}])["step"]

    Raises:
        AssertionError: If the replicas returned different structures, naming both.
    """
    if len(structures) == 1:
        return structures[0]
    return map_leaves(lambda *each: each[0] if all(leaf is each[0] for leaf in each) else PerReplica(each), *structures)


def local_results(value: DistributedValues[T] | T) -> tuple[T, ...]:
    """Return a value's components in the order of the replicas; for a plain value, a tuple of that value alone.

    >>> local_results(PerReplica([1, 2])), local_results(3)
    ((1, 2), (3,))
    """
    return value.values if isinstance(value, DistributedValues) else (value,)


def _component(replica: int, value: Any) -> Any:
    if not isinstance(value, DistributedValues):
        return value
    if replica >= len(value.values):
        raise ValueError(
            f"a {type(value).__name__} of {len(value.values)} values has none for replica {replica}; "
            "expected one for each replica of this worker"
        )
    return value.values[replica]
