"""Many values into one: sums and means over replicas, concatenations, and one value on several devices.

Rules
    * The values of the replicas are moved to the first one's device and accumulated there; then the one result is moved
      to its destination. Gradients on a GPU are thus summed on the GPU and copied to the host once.
    * A single value is not reduced: it keeps its type, and may be returned as the same object.
    * The mean of integers is a float, as with ``/``.
    * A nest is reduced leaf by leaf.
"""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.devices import Device
from paramserver.distribute.core.nest import map_leaves
from paramserver.distribute.core.values import DistributedValues, Mirrored, PerReplica, local_results
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.reduce.combining import NUMBERS, add_all, as_axes, as_tensor, concatenate, sum_inside
from paramserver.distribute.reduce.destinations import Destinations as Destinations
from paramserver.distribute.reduce.destinations import TorchDevices, places, places_for, put

logger = logging.getLogger(__name__)


class ReduceOp(enum.Enum):
    """The way to combine values."""

    SUM = "SUM"
    MEAN = "MEAN"

    @classmethod
    def parse(cls, op: str | ReduceOp) -> ReduceOp:
        """Return an op by its name, in any case.

        >>> ReduceOp.parse("mean")
        <ReduceOp.MEAN: 'MEAN'>

        Raises:
            ValueError: If there is no such op.
            TypeError: If ``op`` is neither a `ReduceOp` nor a text.
        """
        if isinstance(op, ReduceOp):
            return op
        if not isinstance(op, str):
            raise TypeError(f"reduce: op must be 'sum', 'mean' or a ReduceOp, got {type(op).__name__}")
        try:
            return cls(op.upper())
        except ValueError:
            raise ValueError(f"reduce: unknown op {op!r}; expected 'sum' or 'mean'") from None


@dataclass(frozen=True, kw_only=True)
class ReductionToOneDevice:
    """Combines values by moving all of them to one device and accumulating them there. Thread-safe.

    Args:
        reduce_to_device: The device; None for that of the first value.
        accumulation_fn: Combines a list of tensors on that device into one; None for `combining.add_all`.

    Raises:
        ValueError: If ``reduce_to_device`` is not the name of a device.

    >>> ReductionToOneDevice().reduce("mean", PerReplica([1.0, 2.0]), "cpu:0")
    tensor(1.5000)
    """

    reduce_to_device: str | None = None
    accumulation_fn: Callable[[list[torch.Tensor]], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if self.reduce_to_device is not None:
            Device.parse(self.reduce_to_device)

    def reduce(self, op: str | ReduceOp, value: DistributedValues[Any], destinations: Destinations) -> Any:
        """Combine the components of one value. Blocks if they have to be copied to the host.

        Args:
            op: The sum, or the mean: the sum divided by the number of components.
            value: Tensors ``[...]`` of one shape, or numbers. A single component is moved, but not accumulated.
            destinations: The destinations of the result.

        Returns:
            A tensor ``[...]`` of that shape at a single destination, `Mirrored` at several.

        Raises:
            ValueError: If the op is unknown, the destinations are invalid, or the shapes differ.
            AssertionError: If the destinations are a list or a tuple.
            TypeError: If a component is neither a tensor nor a number.
        """
        return self.combine(ReduceOp.parse(op), value.values, places(destinations))

    def batch_reduce(
        self, op: str | ReduceOp, pairs: Sequence[tuple[DistributedValues[Any], Destinations]]
    ) -> list[Any]:
        """Combine several values, each to its own destinations, in their order; see `reduce`."""
        return [self.reduce(op, value, destinations) for value, destinations in pairs]

    def combine(self, op: ReduceOp, values: Sequence[Any], at: TorchDevices) -> Any:
        """Combine components at destinations that are given as torch devices; see `reduce`."""
        if len(values) == 1:
            return put(values[0], at)
        return self.accumulate(op, list(map(as_tensor, values)), len(values), at)

    def accumulate(self, op: ReduceOp, tensors: list[torch.Tensor], count: int, at: TorchDevices) -> Any:
        """Combine one or more tensors into one; MEAN divides the sum by ``count``."""
        named = self.reduce_to_device
        device = tensors[0].device if named is None else Device.parse(named).torch_device
        logger.debug("reduce to %s, then broadcast to %s", device, ", ".join(map(str, at)))
        total = (self.accumulation_fn or add_all)([tensor.to(device) for tensor in tensors])
        return put(total if op is ReduceOp.SUM else total / count, at)


TO_ONE_DEVICE = ReductionToOneDevice()


def reduce(strategy: Worker, op: str | ReduceOp, value: Any, axis: int | Sequence[int] | None = None) -> Any:
    """Combine a value of all replicas into one, on torch's default device. Blocks while it is copied there.

    With an axis, SUM also adds up inside each replica, and MEAN divides the sum of all elements by their number, so
    replicas with larger batches weigh more.

    Args:
        strategy: The strategy of the replicas.
        op: ``"sum"`` or ``"mean"``, in any case, or a `ReduceOp`.
        value: A result of `Strategy.run`, or a nest of such results.
        axis: Axes of dense tensors to combine inside each replica; None combines across replicas only.

    Returns:
        A nest of tensors, without the axes. The mean of a value that is the same for all replicas is that value.

    Raises:
        ValueError: If the op is unknown, an axis is out of range or occurs twice, shapes differ, or a nonzero value
            that is the same for all of several replicas is to be summed.
        TypeError: If ``op`` or ``axis`` has the wrong type, or a replica's value is neither a tensor nor a number.
        NotImplementedError: For an axis of a sparse tensor.
        RuntimeError: Inside a replica, or in the scope of another strategy.

    >>> from paramserver import CentralStorageStrategy
    >>> strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
    >>> batches = PerReplica([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 9.0])])
    >>> strategy.reduce("mean", batches, axis=0)
    tensor(4.)
    """
    with context.cross_replica(strategy, "reduce"):
        parsed, axes = ReduceOp.parse(op), as_axes(axis)
        return map_leaves(lambda leaf: _reduced(strategy, parsed, leaf, axes, places(None)), value)


def reduce_to(strategy: Worker, op: str | ReduceOp, value: Any, destinations: Destinations) -> Any:
    """Combine a value of all replicas into one at its destinations. Blocks if it is copied to the host.

    A ps task is a valid destination: the result is then on the host, from where it is sent.

    Args:
        strategy: The strategy of the replicas.
        op: ``"sum"`` or ``"mean"``, in any case, or a `ReduceOp`.
        value: A result of `Strategy.run`, or a nest of such results.
        destinations: The name of a device, or a variable, tensor or distributed value whose devices are meant.

    Returns:
        A tensor at a single destination, `Mirrored` at several, where places on one device share one tensor; for a
        nest, a nest of these.

    Raises:
        ValueError: As `reduce`, or if a destination is invalid or on another worker.
        AssertionError: If the destinations are a list or a tuple.
        TypeError: As `reduce`.
        RuntimeError: As `reduce`.
    """
    (reduced,) = _batch_reduced(strategy, op, [(value, destinations)], "reduce_to")
    return reduced


def batch_reduce_to(strategy: Worker, op: str | ReduceOp, pairs: Sequence[tuple[Any, Destinations]]) -> list[Any]:
    """Combine several values, each to its own destinations, in their order; see `reduce_to`.

    All destinations are checked before anything is reduced.

    Raises:
        ValueError: As `reduce_to`, or if an element of ``pairs`` is not a pair.
        AssertionError: As `reduce_to`.
        TypeError: As `reduce_to`.
        RuntimeError: As `reduce_to`.
    """
    return _batch_reduced(strategy, op, pairs, "batch_reduce_to")


def broadcast_to(strategy: Worker, value: Any, destinations: Destinations) -> Any:
    """Copy a tensor to all destinations. Blocks if it is copied to the host.

    Args:
        strategy: The strategy of the devices.
        value: A tensor. A number is returned as it is, since it has no device.
        destinations: As for `reduce_to`; ``""`` for all compute devices of this worker.

    Returns:
        `Mirrored`, also at a single destination. Places on one device share one tensor.

    Raises:
        AssertionError: If the destinations are None, a list or a tuple.
        ValueError: If a destination is otherwise invalid or on another worker.
        TypeError: If the value is neither a tensor nor a number.
        RuntimeError: Inside a replica, or in the scope of another strategy.
    """
    with context.cross_replica(strategy, "broadcast_to"):
        if destinations is None:
            raise AssertionError("broadcast_to: destinations must not be None; pass '' for all compute devices")
        everywhere = isinstance(destinations, str) and not destinations
        named = PerReplica(strategy.worker_devices) if everywhere else destinations
        at = places_for(strategy, named, "broadcast_to")
        if isinstance(value, (int, float, complex)):
            return value
        tensor = as_tensor(value)
        return Mirrored([tensor.to(place) for place in at])


def gather(strategy: Worker, value: Any, axis: int) -> Any:
    """Concatenate a value of all replicas, in the order of the replicas, on torch's default device.

    Args:
        strategy: The strategy of the replicas.
        value: A result of `Strategy.run`, or a nest of such results: dense tensors, which may differ in size along the
            axis.
        axis: The axis of the concatenation, counted from the end if negative.

    Returns:
        A nest of tensors. A value that is the same for all replicas comes back unchanged.

    Raises:
        NotImplementedError: For sparse tensors.
        ValueError: For a tensor without axes, an axis out of range, or shapes that differ in other axes.
        TypeError: If the axis is not an int, or a replica's value is neither a tensor nor a number.
        RuntimeError: Inside a replica (use `ReplicaContext.all_gather` there), or in the scope of another strategy.

    >>> from paramserver import CentralStorageStrategy
    >>> strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
    >>> strategy.gather(PerReplica([torch.tensor([1, 2]), torch.tensor([3])]), axis=0)
    tensor([1, 2, 3])
    """
    return _gathered(strategy, value, None, axis, "gather")


def gather_to(strategy: Worker, value: Any, destinations: Destinations, axis: int) -> Any:
    """Concatenate as `gather` does, with the result at its destinations: a tensor at one, `Mirrored` at several.

    Raises:
        AssertionError: If the destinations are a list or a tuple.
        ValueError: As `gather`, or if a destination is invalid or on another worker.
        NotImplementedError: As `gather`.
        TypeError: As `gather`.
        RuntimeError: As `gather`.
    """
    return _gathered(strategy, value, destinations, axis, "gather_to")


def _reduced(strategy: Worker, op: ReduceOp, leaf: Any, axes: tuple[int, ...], at: TorchDevices) -> Any:
    if not isinstance(leaf, DistributedValues):
        _check_same_for_all(strategy, op, leaf)
    values = local_results(leaf)
    if not axes:
        return TO_ONE_DEVICE.combine(op, values, at)
    sums, counts = zip(*(sum_inside(as_tensor(value), axes) for value in values), strict=True)
    return TO_ONE_DEVICE.accumulate(op, list(sums), sum(counts), at)


def _check_same_for_all(strategy: Worker, op: ReduceOp, value: Any) -> None:
    """Refuse to sum a value that is the same for all of several replicas, unless it is 0; its mean is defined."""
    count = strategy.num_replicas_in_sync
    if op is ReduceOp.MEAN or count == 1 or (isinstance(value, NUMBERS) and not np.any(value)):
        return
    raise ValueError(
        f"reduce: {value!r} is not a PerReplica but the same for all {count} replicas, and cannot be reduced with the "
        "given reduce op SUM; pass what run() returned for each replica, or use MEAN"
    )


def _batch_reduced(
    strategy: Worker, op: str | ReduceOp, pairs: Sequence[tuple[Any, Destinations]], call: str
) -> list[Any]:
    with context.cross_replica(strategy, call):
        parsed = ReduceOp.parse(op)
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{call}: expected pairs (value, destinations), got {pair!r}")
        at = [places_for(strategy, destinations, call) for _, destinations in pairs]
        return [
            map_leaves(functools.partial(_reduced, strategy, parsed, axes=(), at=own), value)
            for (value, _), own in zip(pairs, at, strict=True)
        ]


def _gathered(strategy: Worker, value: Any, destinations: Destinations, axis: int, call: str) -> Any:
    if context.current_replica() is not None:
        raise RuntimeError(
            f"{call} requires being in cross-replica context, and was called inside a replica; "
            "use get_replica_context().all_gather(), which gives every replica the result"
        )
    with context.cross_replica(strategy, call):
        at = places_for(strategy, destinations, call)
        return map_leaves(lambda leaf: _joined(leaf, axis, at), value)


def _joined(leaf: Any, axis: int, at: TorchDevices) -> Any:
    if not isinstance(leaf, DistributedValues):
        return leaf
    return put(concatenate(list(map(as_tensor, leaf.values)), axis, at[0]), at)
