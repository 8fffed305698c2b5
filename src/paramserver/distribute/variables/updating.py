"""Updates of variables from the cross-replica context: the function runs on the worker, its assignments on the ps.

No code travels to a ps: it is told to assign or to add, and does so at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.context import Frame
from paramserver.distribute.core.devices import Device
from paramserver.distribute.core.nest import map_leaves
from paramserver.distribute.core.values import DistributedValues, PerReplica, local_results
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.variables import anchor
from paramserver.distribute.variables.variable import Variable


def update(
    strategy: Worker,
    variable: Any,
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    group: bool,
) -> Any:
    """Call ``fn(variable, *args, **kwargs)`` once to change a variable.

    The function receives the variable on the ps, without the wrapper that aggregates replicas' values; its assignments
    take effect at once. Blocks while they do; inside a replica, until all replicas have reached the same update.

    Args:
        strategy: The strategy.
        variable: One of its variables.
        fn: The function.
        args: Its other arguments. A value on several devices must be on exactly one, and is unwrapped.
        kwargs: Its arguments by name, treated alike.
        group: Whether to return the function's result as it is; otherwise each leaf of it becomes a tuple.

    Raises:
        ValueError: If ``variable`` is not one of this strategy, or an argument has a value for each replica.
        RuntimeError: Inside the scope of another strategy.
    """
    _check_variable(strategy, variable, "update")
    frame = context.current()
    if frame is not None and frame.replica is not None and frame.strategy is strategy:
        return frame.replica.merge_call(
            lambda strategy, args, kwargs: update(strategy, variable, fn, args, kwargs, group),
            (tuple(args), dict(kwargs)),
        )
    with context.cross_replica(strategy, "update"):
        args, kwargs = map_leaves(lambda leaf: _one_value(variable, leaf), (tuple(args), dict(kwargs)))
        with context.entered(Frame(strategy, update_device=variable.device)):
            result = fn(variable.get(), *args, **kwargs)
        return result if group else map_leaves(local_results, result)


def update_non_slot(
    strategy: Worker,
    colocate_with: Any,
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    group: bool,
) -> Any:
    """Call ``fn(*args, **kwargs)`` once to change state that belongs to no single variable.

    Args:
        strategy: The strategy.
        colocate_with: The place of the state: a result of `non_slot_devices`, or a device by its name.
        fn: The function.
        args: Its arguments, which are passed as they are.
        kwargs: Its arguments by name, passed as they are.
        group: As for `update`.

    Raises:
        ValueError: If ``colocate_with`` names no device.
        RuntimeError: Inside a replica, or inside the scope of another strategy.
    """
    device = str(Device.parse(getattr(colocate_with, "device", colocate_with)))
    with context.cross_replica(strategy, "update_non_slot"):
        with context.entered(Frame(strategy, update_device=device)):
            result = fn(*args, **kwargs)
        return result if group else map_leaves(local_results, result)


def colocate_vars_with(strategy: Worker, variable: Any) -> contextlib.AbstractContextManager[None]:
    """Create variables of this thread in the ``with`` block on the ps of this variable, without taking a turn.

    Raises:
        ValueError: If ``variable`` is not one of this strategy.
        RuntimeError: Outside of the strategy's scope.
    """
    context.check_scope(strategy, "colocate_vars_with")
    _check_variable(strategy, variable, "colocate_vars_with")
    return anchor.beside(variable)


def non_slot_devices(variables: Iterable[Variable]) -> Variable:
    """Return the variable with the smallest name, which is the same on every worker.

    Raises:
        ValueError: If there is no variable.
    """
    return min(variables, key=lambda variable: variable.name)


def read_var(variable: Variable) -> torch.Tensor:
    """Return a copy of a variable's present value; nothing is reduced."""
    return variable.value()


def value_container(value: Any) -> Any:
    """Return the wrapper that aggregates a variable's values while it is alive; any other value is returned itself."""
    container = value.container() if isinstance(value, Variable) else None
    return value if container is None else container


def _check_variable(strategy: Worker, variable: Any, call: str) -> None:
    if not isinstance(variable, Variable):
        raise ValueError(
            f"{call} must only be passed a variable created in this strategy.scope(). It must be a Variable, "
            f"got {type(variable).__name__}"
        )
    if variable.strategy is not strategy:
        raise ValueError(
            f"{call} must only be passed a variable created in this strategy.scope(): {variable!r} belongs to "
            f"{variable.strategy!r}, not to {strategy!r}"
        )


def _one_value(variable: Variable, leaf: Any) -> Any:
    if not isinstance(leaf, DistributedValues):
        return leaf
    if isinstance(leaf, PerReplica) or len(leaf.values) > 1:
        raise ValueError(
            f"update of variable {variable.name!r}: cannot update variable with a {type(leaf).__name__} of "
            f"{len(leaf.values)} values; reduce it to the variable first, with strategy.extended.reduce_to"
        )
    return leaf.values[0]
