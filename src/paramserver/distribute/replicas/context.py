"""The context of a function that runs on a replica: its place among the replicas, and calls on behalf of all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.context import Frame
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.reduce import collectives
from paramserver.distribute.reduce.reduction import ReduceOp


class ReplicaContext:
    """One replica of a strategy, while a function runs on it. Entered by `Strategy.run`, or with ``with``.

    Args:
        strategy: The strategy.
        replica_id_in_sync_group: The index of the replica, from 0; an int, a tensor of one, or None if unknown.

    Raises:
        ValueError: If the id has another type.

    Attributes:
        is_done: Whether the function on this replica has ended.
    """

    is_done = False

    def __init__(self, strategy: Worker, replica_id_in_sync_group: int | torch.Tensor | None) -> None:
        known = replica_id_in_sync_group
        if known is not None and (isinstance(known, bool) or not isinstance(known, (int, torch.Tensor))):
            raise ValueError(
                f"ReplicaContext: replica_id_in_sync_group must be an int, a tensor or None, got {known!r}"
            )
        self.strategy = strategy
        self.replica_id_in_sync_group = known
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of replicas of this worker."""
        return self.strategy.num_replicas_in_sync

    @property
    def index(self) -> int:
        """The index of this replica among those of the worker; 0 if it is unknown."""
        return int(self.replica_id_in_sync_group or 0)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of this replica."""
        return (self.strategy.worker_devices[self.index],)

    def merge_call(
        self, fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``fn(strategy, *args, **kwargs)`` once for all replicas, in cross-replica context.

        Blocks until every replica has reached its ``merge_call``. Where the replicas' arguments differ, ``fn`` receives
        a `PerReplica`. Each replica receives its own component of the result.

        Raises:
            RuntimeError: If this is not the replica of the present thread, or the replicas make different numbers of
                merge calls.
        """
        self._check_current("merge_call")
        return self._merge(fn, tuple(args), dict(kwargs or {}))

    def all_reduce(self, op: str | ReduceOp, value: Any) -> Any:
        """Combine the values of all replicas, leaf by leaf; every replica gets the result.

        Blocks until every replica has reached the call, once for the whole nest. Differentiable: gradients are combined
        over the replicas as the values were, so backward blocks, too, and must run on all replicas or on none. Call
        backward inside the function that `Strategy.run` runs; for backward, replicas on GPUs need a GPU each. With one
        replica, the value itself is returned.

        Args:
            op: ``"sum"`` or ``"mean"``, in any case, or a `ReduceOp`.
            value: A nest of tensors ``[...]``, dense or sparse, or numbers, which become tensors.

        Returns:
            The same structure, of tensors ``[...]`` that belong to this replica, on the device of its value.

        Raises:
            ValueError: If the op is unknown, or shapes, ops or kinds of tensors differ between the replicas.
            TypeError: If a leaf is neither a tensor nor a number.
            AssertionError: If the structures differ between the replicas.
            RuntimeError: As `merge_call`.

        >>> from paramserver import CentralStorageStrategy, get_replica_context
        >>> strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
        >>> def double(x):
        ...     return get_replica_context().all_reduce("sum", {"x": x})
        >>> strategy.run(double, [torch.ones(2)])["x"].values
        (tensor([2., 2.]), tensor([2., 2.]))
        """
        return collectives.all_reduce(self, op, value)

    def all_gather(self, value: Any, axis: int) -> Any:
        """Concatenate the values of all replicas, leaf by leaf, in the order of the replicas; all get the result.

        Blocks until every replica has reached the call, once for the whole nest. Differentiable: each replica gets its
        own slice of the sum of all gradients; backward has the same requirements as in `all_reduce`. With one replica,
        the value itself is returned.

        Args:
            value: A nest of dense tensors of rank 1 or more, which may differ between replicas in size along the axis.
            axis: The axis of the concatenation, counted from the end if negative.

        Returns:
            The same structure, of tensors that belong to this replica, on the device of its value.

        Raises:
            NotImplementedError: For sparse tensors.
            ValueError: If a tensor has no axes, the axis is out of range, or shapes differ along another axis.
            TypeError: If the axis is not an int, or a leaf is neither a tensor nor a number.
            AssertionError: If the structures differ between the replicas.
            RuntimeError: As `merge_call`.
        """
        return collectives.all_gather(self, value, axis)

    def _check_current(self, call: str) -> None:
        frame = context.current()
        if frame is None or frame.replica is None:
            raise RuntimeError(f"{call}: Need to be inside call_for_each_replica(), or run()")
        if frame.replica is not self:
            raise RuntimeError(
                f"{call}: Mismatching ReplicaContext: {self!r} is not {frame.replica!r}, which this thread is in"
            )

    def _merge(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with context.entered(Frame(self.strategy)):
            return fn(self.strategy, *args, **kwargs)

    def __enter__(self) -> ReplicaContext:
        self._entered.append(context.entered(Frame(self.strategy, self)))
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    def __repr__(self) -> str:
        return f"<ReplicaContext {self.replica_id_in_sync_group} of {self.num_replicas_in_sync} of {self.strategy!r}>"
