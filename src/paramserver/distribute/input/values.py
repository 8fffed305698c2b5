"""Values of a function, one for each replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from paramserver.distribute.core import context
from paramserver.distribute.core.input_context import ValueContext
from paramserver.distribute.core.values import PerReplica
from paramserver.distribute.core.worker import Worker

T = TypeVar("T")


def distribute_values_from_function(strategy: Worker, fn: Callable[[ValueContext], T]) -> PerReplica[T]:
    """Call a function for each replica; return a `PerReplica`, even for one replica or if all values are equal.

    Args:
        strategy: The strategy of the replicas.
        fn: Called for one replica after the other, in order.

    Raises:
        RuntimeError: Inside a replica, or inside the scope of another strategy.
    """
    with context.cross_replica(strategy, "distribute_values_from_function"):
        count = strategy.num_replicas_in_sync
        return PerReplica([fn(ValueContext(replica, count)) for replica in range(count)])
