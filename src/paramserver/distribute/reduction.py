"""Many values into one: sums and means over replicas, concatenations, and one value on several devices.

Rules
    * The values of the replicas are moved to the first one's device and accumulated there, then the one result is moved
      to its destination: gradients on a GPU are summed on the GPU and copied to the host once.
    * What there is only one of is not reduced: it keeps its type, and may come back as the very same object.
    * Numbers count as tensors, truth values as 0 and 1. A mean of integers is a float, as with ``/``.
    * Sparse (COO) tensors stay sparse: their indices and values are concatenated, and an index that is there twice means
      the sum of both (D13).
    * A nest is reduced leaf by leaf.
"""

from __future__ import annotations

import enum
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paramserver.cluster import parse_role
from paramserver.distribute import context
from paramserver.distribute.devices import Device
from paramserver.distribute.nest import map_leaves
from paramserver.distribute.values import DistributedValues, Mirrored, PerReplica, local_results

if TYPE_CHECKING:
    from paramserver.distribute.strategy import Strategy

logger = logging.getLogger(__name__)

NUMBERS = (bool, int, float, complex, np.generic, np.ndarray)


class ReduceOp(enum.Enum):
    """How values are combined."""

    SUM = "SUM"
    MEAN = "MEAN"

    @classmethod
    def parse(cls, op: str | ReduceOp) -> ReduceOp:
        """An op by name, in any case.

        >>> ReduceOp.parse("mean")
        <ReduceOp.MEAN: 'MEAN'>

        Raises:
            ValueError: If there is no such op.
            TypeError: If it is no name.
        """
        if isinstance(op, ReduceOp):
            return op
        if not isinstance(op, str):
            raise TypeError(f"reduce: op must be 'sum', 'mean' or a ReduceOp, got {type(op).__name__}")
        try:
            return cls(op.upper())
        except ValueError:
            raise ValueError(f"reduce: unknown op {op!r}; expected 'sum' or 'mean'") from None


Destinations = Any
"""Where a result is to be: a device or its name, or a variable, a tensor or a distributed value, which mean the devices
that they are on. None means torch's default device, the host unless a program sets another."""


@dataclass(frozen=True, kw_only=True)
class ReductionToOneDevice:
    """Combines values by moving all of them to one device and accumulating them there. Thread-safe.

    Args:
        reduce_to_device: That device; None for the one that the first value is on.
        accumulation_fn: Makes one tensor of a list of tensors on that device; None for `add_all`.

    Raises:
        ValueError: If ``reduce_to_device`` names no device.

    >>> ReductionToOneDevice().reduce("mean", PerReplica([1.0, 2.0]), "cpu:0")
    tensor(1.5000)
    """

    reduce_to_device: str | None = None
    accumulation_fn: Callable[[list[torch.Tensor]], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if self.reduce_to_device is not None:
            Device.parse(self.reduce_to_device)

    def reduce(self, op: str | ReduceOp, value: DistributedValues[Any], destinations: Destinations) -> Any:
        """Combine the components of one value. Blocks where they have to be copied to the host.

        Args:
            op: Sum, or the sum divided by the number of components.
            value: Tensors ``[...]`` of one shape, or numbers. A single one is not accumulated, but moved.
            destinations: Where the result is to be.

        Returns:
            A tensor ``[...]`` of that shape at a single destination, `Mirrored` at several.

        Raises:
            ValueError: If the op is unknown, the destinations are none, or the shapes differ.
            TypeError: If a component is neither a tensor nor a number.
        """
        parsed, places = ReduceOp.parse(op), _places(_devices(destinations))
        if len(value.values) == 1:
            return _put(value.values[0], places)
        return self.combine(parsed, list(map(as_tensor, value.values)), len(value.values), places)

    def batch_reduce(
        self, op: str | ReduceOp, pairs: Sequence[tuple[DistributedValues[Any], Destinations]]
    ) -> list[Any]:
        """`reduce` of several pairs of a value and its destinations, in their order."""
        return [self.reduce(op, value, destinations) for value, destinations in pairs]

    def combine(
        self, op: ReduceOp, tensors: list[torch.Tensor], count: int, places: tuple[torch.device, ...]
    ) -> Any:
        """Accumulate tensors and put the result in its places; for MEAN it is divided by ``count`` first."""
        total = self.total(tensors)
        logger.debug("reduce to %s, then broadcast to %s", total.device, ", ".join(map(str, places)))
        return _put(total if op is ReduceOp.SUM else total / count, places)

    def total(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """One tensor of several, on the device of this reduction."""
        named = self.reduce_to_device
        device = tensors[0].device if named is None else Device.parse(named).torch_device
        return (self.accumulation_fn or add_all)([tensor.to(device) for tensor in tensors])


TO_ONE_DEVICE = ReductionToOneDevice()


def reduce(strategy: Strategy, op: str | ReduceOp, value: Any, axis: int | Sequence[int] | None = None) -> Any:
    """Combine a value of all replicas into one, on torch's default device. Blocks while it is copied there.

    With an axis, SUM adds up inside each replica as well, and MEAN divides the sum of all by the number of all: replicas
    with batches of different sizes count by their sizes (D04).

    Args:
        strategy: Whose replicas.
        op: ``"sum"`` or ``"mean"``, in any case, or a `ReduceOp`.
        value: What `Strategy.run` returned, or a nest of that.
        axis: Axes of dense tensors to combine inside each replica; None combines across replicas only.

    Returns:
        A nest of tensors, without the axes. A value that is the same for all replicas is its own mean.

    Raises:
        ValueError: If the op is unknown, an axis is out of range or there twice, shapes differ, or a value that is the
            same for all of several replicas is to be summed and is not 0.
        TypeError: If ``op`` is no op, ``axis`` no axis, or a replica's value neither a tensor nor a number.
        NotImplementedError: For an axis of a sparse tensor.
        RuntimeError: Inside a replica, or in the scope of another strategy.

    >>> from paramserver import CentralStorageStrategy
    >>> strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
    >>> batches = PerReplica([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 9.0])])
    >>> strategy.reduce("mean", batches, axis=0)
    tensor(4.)
    """
    with context.cross_replica(strategy, "reduce"):
        parsed, axes = ReduceOp.parse(op), _checked_axes(axis)
        return map_leaves(functools.partial(_reduced, strategy, parsed, axes, _places(_devices(None))), value)


def reduce_to(strategy: Strategy, op: str | ReduceOp, value: Any, destinations: Destinations) -> Any:
    """Combine a value of all replicas into one at its destinations. Blocks where it is copied to the host.

    A ps task is a destination like others: the result is on the host, from where it is sent.

    Args:
        strategy: Whose replicas.
        op: ``"sum"`` or ``"mean"``, in any case, or a `ReduceOp`.
        value: What `Strategy.run` returned, or a nest of that.
        destinations: A device's name, or a variable, tensor or distributed value whose devices are meant.

    Returns:
        A tensor at a single destination, `Mirrored` at several; of a nest a nest of that. Places on one device share one
        tensor.

    Raises:
        ValueError: As `reduce`, or if the destinations are none, or of another worker (D16).
        AssertionError: If they are a list or a tuple.
        TypeError: As `reduce`.
        RuntimeError: As `reduce`.
    """
    (reduced,) = _batch_reduced(strategy, op, [(value, destinations)], "reduce_to")
    return reduced


def batch_reduce_to(strategy: Strategy, op: str | ReduceOp, pairs: Sequence[tuple[Any, Destinations]]) -> list[Any]:
    """`reduce_to` of each pair of a value and its destinations, in their order (D14).

    All destinations are checked before anything is reduced.

    Raises:
        ValueError: As `reduce_to`, or if a pair is none.
        AssertionError: As `reduce_to`.
        TypeError: As `reduce_to`.
        RuntimeError: As `reduce_to`.
    """
    return _batch_reduced(strategy, op, pairs, "batch_reduce_to")


def broadcast_to(strategy: Strategy, value: Any, destinations: Destinations) -> Any:
    """A tensor on all destinations. Blocks where it is copied to the host.

    Args:
        strategy: Whose devices.
        value: A tensor; a number is returned as it is, since it has no device (D19).
        destinations: As for `reduce_to`; ``""`` for all compute devices of this worker.

    Returns:
        `Mirrored`, also at a single destination. Places on one device share one tensor.

    Raises:
        AssertionError: If the destinations are None, a list or a tuple.
        ValueError: If they are something else, or of another worker.
        TypeError: If the value is neither a tensor nor a number.
        RuntimeError: Inside a replica, or in the scope of another strategy.
    """
    with context.cross_replica(strategy, "broadcast_to"):
        if destinations is None:
            raise AssertionError("broadcast_to: destinations must not be None; pass '' for all compute devices")
        everywhere = isinstance(destinations, str) and not destinations
        named = PerReplica(strategy.extended.worker_devices) if everywhere else destinations
        places = _own_places(strategy, named, "broadcast_to")
        if isinstance(value, (int, float, complex)):
            return value
        tensor = as_tensor(value)
        return Mirrored([tensor.to(place) for place in places])


def gather(strategy: Strategy, value: Any, axis: int) -> Any:
    """Concatenate a value of all replicas, in the order of the replicas, on torch's default device (D18).

    Args:
        strategy: Whose replicas.
        value: What `Strategy.run` returned, or a nest of that: dense tensors, which may differ in size along the axis.
        axis: Along which, from the end if negative.

    Returns:
        A nest of tensors. A value that is the same for all replicas comes back unchanged.

    Raises:
        NotImplementedError: For sparse tensors.
        ValueError: For a tensor without axes, an axis out of range, or shapes that differ in other axes.
        TypeError: If the axis is no int, or a replica's value neither a tensor nor a number.
        RuntimeError: Inside a replica, where `ReplicaContext.all_gather` does it, or in the scope of another strategy.

    >>> from paramserver import CentralStorageStrategy
    >>> strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
    >>> strategy.gather(PerReplica([torch.tensor([1, 2]), torch.tensor([3])]), axis=0)
    tensor([1, 2, 3])
    """
    return _gathered(strategy, value, None, axis, "gather")


def gather_to(strategy: Strategy, value: Any, destinations: Destinations, axis: int) -> Any:
    """`gather`, with the result at its destinations: a tensor at a single one, `Mirrored` at several.

    Raises:
        AssertionError: If the destinations are a list or a tuple.
        ValueError: As `gather`, or if the destinations are none, or of another worker.
        NotImplementedError: As `gather`.
        TypeError: As `gather`.
        RuntimeError: As `gather`.
    """
    return _gathered(strategy, value, destinations, axis, "gather_to")


# --- arithmetic


def as_tensor(value: Any) -> torch.Tensor:
    """A replica's value as a tensor.

    Raises:
        TypeError: If it is neither a tensor nor a number.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, NUMBERS):
        return torch.tensor(value)
    raise TypeError(f"a value of a replica must be a tensor or a number to be combined with others, got {value!r}")


def add_all(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors ``[...]`` on one device; of sparse ones by concatenation, without merging duplicates.

    >>> add_all([torch.ones(2), torch.ones(2)])
    tensor([2., 2.])

    Raises:
        ValueError: If their shapes differ, or some are sparse and some are not.
    """
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"reduce: the values of the replicas must have one shape, got {shapes}; "
            "combine what differs in size with axis=, or with gather"
        )
    if any(tensor.layout is not first.layout for tensor in tensors):
        raise ValueError("reduce: some replicas have a sparse value and some a dense one; expected one kind")
    if first.layout is torch.sparse_coo:
        return first if len(tensors) == 1 else _concatenated_sparse(tensors)
    # True + True is True to torch, where 2 is meant.
    return functools.reduce(torch.add, tensors[1:], first.long() if first.dtype is torch.bool else first)


def concatenate(values: Sequence[Any], axis: int, device: torch.device) -> torch.Tensor:
    """Dense tensors one after the other on one device.

    Raises:
        NotImplementedError: For sparse tensors.
        ValueError: For tensors without axes, an axis out of range, or shapes that differ in other axes.
        TypeError: If the axis is no int, or a value neither a tensor nor a number.
    """
    tensors = [as_tensor(value) for value in values]
    for tensor in tensors:
        check_gatherable(tensor, axis)
    others = {(*tensor.shape[:axis], *tensor.shape[axis:][1:]) for tensor in tensors}
    if len(others) > 1:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ValueError(f"gather: shapes may differ along axis {axis} only, got {shapes}")
    return torch.cat([tensor.to(device) for tensor in tensors], axis)


def check_gatherable(tensor: torch.Tensor, axis: int) -> None:
    """Raises what `concatenate` does for a tensor that cannot be gathered along ``axis``."""
    if tensor.layout is not torch.strided:
        raise NotImplementedError("gather: sparse tensors are not supported; gather their indices and values instead")
    if not tensor.ndim:
        raise ValueError("gather: a tensor without axes cannot be concatenated; expected one of rank 1 or more")
    _in_rank(tensor, _checked_axes(axis))


def _concatenated_sparse(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        torch.cat([tensor._indices() for tensor in tensors], dim=1),
        torch.cat([tensor._values() for tensor in tensors]),
        tensors[0].shape,
        check_invariants=False,  # each of them was checked, or not, when it was made
    )


# --- leaf by leaf


def _reduced(
    strategy: Strategy, op: ReduceOp, axes: tuple[int, ...], places: tuple[torch.device, ...], leaf: Any
) -> Any:
    if not isinstance(leaf, DistributedValues):
        _check_same_for_all(strategy, op, leaf)
    values = local_results(leaf)
    if not axes and len(values) == 1:
        return _put(values[0], places)
    tensors = list(map(as_tensor, values))
    if not axes:
        return TO_ONE_DEVICE.combine(op, tensors, len(tensors), places)
    sums, counts = zip(*(_reduced_inside(tensor, axes) for tensor in tensors), strict=True)
    return TO_ONE_DEVICE.combine(op, list(sums), sum(counts), places)


def _reduced_inside(tensor: torch.Tensor, axes: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """The sum over axes, and how many values of the tensor are in each of its values."""
    if tensor.layout is not torch.strided:
        raise NotImplementedError("reduce: an axis of a sparse tensor cannot be combined; pass axis=None")
    inside = _in_rank(tensor, axes)
    return tensor.sum(inside), math.prod(tensor.shape[axis] for axis in inside)


def _check_same_for_all(strategy: Strategy, op: ReduceOp, value: Any) -> None:
    """A value of no replica in particular has a mean, but no sum over several replicas, unless that is 0 (D09)."""
    count = strategy.num_replicas_in_sync
    if op is ReduceOp.MEAN or count == 1 or (isinstance(value, NUMBERS) and not np.any(value)):
        return
    raise ValueError(
        f"reduce: {value!r} is no PerReplica but the same for all {count} replicas, and cannot be reduced with the given "
        "reduce op SUM; pass what run() returned for each replica, or use MEAN"
    )


def _batch_reduced(
    strategy: Strategy, op: str | ReduceOp, pairs: Sequence[tuple[Any, Destinations]], call: str
) -> list[Any]:
    with context.cross_replica(strategy, call):
        parsed = ReduceOp.parse(op)
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{call}: expected pairs (value, destinations), got {pair!r}")
        places = [_own_places(strategy, destinations, call) for _, destinations in pairs]
        return [
            map_leaves(functools.partial(_reduced, strategy, parsed, (), own), value)
            for (value, _), own in zip(pairs, places, strict=True)
        ]


def _gathered(strategy: Strategy, value: Any, destinations: Destinations, axis: int, call: str) -> Any:
    frame = context.current()
    if frame is not None and frame.replica is not None:
        raise RuntimeError(
            f"{call} requires being in cross-replica context, and was called inside a replica; "
            "use get_replica_context().all_gather(), which gives every replica the result"
        )
    with context.cross_replica(strategy, call):
        places = _own_places(strategy, destinations, call)
        return map_leaves(
            lambda leaf: _put(concatenate(leaf.values, axis, places[0]), places)
            if isinstance(leaf, DistributedValues)
            else leaf,
            value,
        )


# --- axes


def _checked_axes(axis: Any) -> tuple[int, ...]:
    axes = () if axis is None else tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in axes):
        raise TypeError(f"axis must be an int or a list or tuple of ints, got {axis!r}")
    return axes


def _in_rank(tensor: torch.Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    rank = tensor.ndim
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(f"axis {axis} is out of range for value with rank {rank}")
    counted = tuple(axis % rank for axis in axes)
    if len(set(counted)) < len(counted):
        raise ValueError(f"axis {axes} names an axis of a value with rank {rank} twice")
    return counted


# --- destinations


def _put(value: Any, places: tuple[torch.device, ...]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value  # a number has no device
    return value.to(places[0]) if len(places) == 1 else Mirrored([value.to(place) for place in places])


def _own_places(strategy: Strategy, destinations: Destinations, call: str) -> tuple[torch.device, ...]:
    devices = _devices(destinations)
    for device in devices:
        if isinstance(device, Device) and device.job:
            _check_is_no_other_worker(strategy, device, call)
    return _places(devices)


def _check_is_no_other_worker(strategy: Strategy, device: Device, call: str) -> None:
    own = Device.parse(strategy.extended.worker_devices[0])
    if own.job and device.is_remote(own.job, own.task) and parse_role(device.job).trains:
        raise ValueError(
            f"{call}: Cannot reduce to another worker: {device} is not of this task, /job:{own.job}/task:{own.task}; "
            "reduce to a device of this task or to a ps"
        )


def _devices(destinations: Destinations) -> tuple[Device | torch.device, ...]:
    if destinations is None:
        return (torch.get_default_device(),)
    if isinstance(destinations, (list, tuple)):
        raise AssertionError(
            f"destinations must not be a {type(destinations).__name__}: got {destinations!r}; "
            "pass a distributed value for several"
        )
    if isinstance(destinations, str) and not destinations:
        raise ValueError("destinations can not be empty: expected the name of a device, such as 'cpu:0'")
    return tuple(map(_device, local_results(destinations)))


def _device(destination: Any) -> Device:
    is_name = isinstance(destination, (str, torch.device, Device))
    device = destination if is_name else getattr(destination, "device", None)
    is_known = is_name or isinstance(destination, torch.Tensor) or hasattr(destination, "assign")
    if not is_known or device is None:
        raise ValueError(
            "destinations must be one of: the name of a device, a variable, a tensor, a distributed value; "
            f"got {destination!r}"
        )
    return Device.parse(device)


def _places(devices: tuple[Device | torch.device, ...]) -> tuple[torch.device, ...]:
    return tuple(device if isinstance(device, torch.device) else _place(device) for device in devices)


def _place(device: Device) -> torch.device:
    return torch.device("cpu") if device.job == "ps" else device.torch_device
