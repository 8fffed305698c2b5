"""Differentiable operations that combine tensors of all replicas.

Rules
    * A call is one merge of all replicas, for any number of tensors, and so is its backward: all replicas make the same
      calls in the same order, and all of them run backward, or none does.
    * Every replica gets memory of its own, on the device of its value.
    * Backward runs inside the function that `Strategy.run` runs. Autograd runs a GPU's work on a thread of that GPU,
      which waits in the merge: replicas that combine gradients need a GPU each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.context import Frame, Replica
from paramserver.distribute.core.nest import leaves, map_leaves
from paramserver.distribute.core.values import local_results, regroup
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.reduce.combining import as_tensor, check_gatherable, concatenate
from paramserver.distribute.reduce.reduction import TO_ONE_DEVICE, ReduceOp


def all_reduce(replica: Replica, op: str | ReduceOp, nest: Any) -> Any:
    """Combine the values of all replicas, leaf by leaf, for each of them. See `ReplicaContext.all_reduce`."""
    parsed = ReduceOp.parse(op)
    if replica.num_replicas_in_sync == 1:
        return nest
    tensors = map_leaves(as_tensor, nest)
    reduced = iter(_AllReduce.apply(replica, parsed, tensors, *leaves(tensors)))  # type: ignore[no-untyped-call]
    return map_leaves(lambda _: next(reduced), tensors)


def all_gather(replica: Replica, nest: Any, axis: int) -> Any:
    """Concatenate the values of all replicas, leaf by leaf, for each of them. See `ReplicaContext.all_gather`."""
    tensors = map_leaves(as_tensor, nest)
    for tensor in leaves(tensors):
        check_gatherable(tensor, axis)
    if replica.num_replicas_in_sync == 1:
        return nest
    gathered = iter(_AllGather.apply(replica, axis, tensors, *leaves(tensors)))  # type: ignore[no-untyped-call]
    return map_leaves(lambda _: next(gathered), tensors)


@dataclass(frozen=True, eq=False)
class _Given:
    """One replica's contribution to a merge. Not a nest, so that an object that all replicas pass counts for each."""

    nest: Any
    how: ReduceOp | int


@dataclass(frozen=True)
class _Gathered:
    """The concatenation of all parts, and the start of the replica's own part in it."""

    value: torch.Tensor
    start: int


class _AllReduce(torch.autograd.Function):
    """A sum or mean of all replicas, used by all: its gradient is the sum or mean of their gradients."""

    @staticmethod
    def forward(ctx: Any, replica: Replica, op: ReduceOp, nest: Any, *_: torch.Tensor) -> tuple[Any, ...]:
        ctx.replica, ctx.op = replica, op
        return tuple(leaves(replica.merge_call(_reduce_for_each, [_Given(nest, op)])))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        with _inside(ctx.replica):
            return None, None, None, *all_reduce(ctx.replica, ctx.op, list(gradients))


class _AllGather(torch.autograd.Function):
    """The concatenation of all parts, used by all: a part's gradient is its slice of the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, replica: Replica, axis: int, nest: Any, *tensors: torch.Tensor) -> tuple[Any, ...]:
        gathered: list[_Gathered] = leaves(replica.merge_call(_gather_for_each, [_Given(nest, axis)]))
        ctx.replica, ctx.axis = replica, axis
        ctx.own = [(each.start, tensor.shape[axis]) for each, tensor in zip(gathered, tensors, strict=True)]
        return tuple(each.value for each in gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        with _inside(ctx.replica):
            sums = all_reduce(ctx.replica, ReduceOp.SUM, list(gradients))
        own = [total.narrow(ctx.axis, *part) for total, part in zip(sums, ctx.own, strict=True)]
        return None, None, None, *own


def _reduce_for_each(_: Worker, given: Any) -> Any:
    nests, op = _agreed(given, "all_reduce")
    with torch.no_grad():
        return map_leaves(functools.partial(_reduced, op), *nests)


def _gather_for_each(_: Worker, given: Any) -> Any:
    nests, axis = _agreed(given, "all_gather")
    with torch.no_grad():
        return map_leaves(functools.partial(_gathered, axis), *nests)


def _reduced(op: ReduceOp, *tensors: torch.Tensor) -> Any:
    reduced = TO_ONE_DEVICE.combine(op, tensors, (tensors[0].device,))
    return regroup([reduced.to(tensor.device, copy=True) for tensor in tensors])


def _gathered(axis: int, *tensors: torch.Tensor) -> Any:
    gathered = concatenate(tensors, axis, tensors[0].device)
    starts = [sum(tensor.shape[axis] for tensor in tensors[:index]) for index in range(len(tensors))]
    return regroup(
        [_Gathered(gathered.to(tensor.device, copy=True), start) for tensor, start in zip(tensors, starts, strict=True)]
    )


def _agreed(given: Any, call: str) -> tuple[list[Any], Any]:
    """Return the nest of each replica, and the op or axis that all replicas agree on."""
    each: tuple[_Given, ...] = local_results(given)
    ways = {one.how for one in each}
    if len(ways) > 1:
        raise ValueError(
            f"{call}: the replicas ask for different things: {', '.join(str(one.how) for one in each)}; "
            "every replica must make the same calls in the same order"
        )
    return [one.nest for one in each], each[0].how


@contextlib.contextmanager
def _inside(replica: Replica) -> Iterator[None]:
    """Enter, for a backward, the context of the replica that made the forward, also on a thread of autograd."""
    frame = context.current()
    if frame is None and not replica.is_done:
        with context.entered(Frame(replica.strategy, replica)):
            yield
    elif frame is None or frame.replica is not replica:
        raise RuntimeError(
            f"backward through all_reduce or all_gather of {replica!r}: it combines the gradients of all replicas, but "
            "they have ended, or this thread is in another replica; call backward() inside the function that run() runs"
        )
    else:
        yield
