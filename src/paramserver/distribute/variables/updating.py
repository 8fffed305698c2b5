"""Updates of variables from the cross-replica context: a function runs on the worker, its assignments on the ps.

Nothing that can be executed ever travels: a ps is told to assign or to add, and carries that out at once.
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

    The function gets what lies on the ps, without what aggregates replicas' values around it; what it assigns is
    assigned at once. Blocks as its assignments do; inside a replica until all replicas have come to the same update.

    Args:
        strategy: The strategy.
        variable: One of its variables.
        fn: The function.
        args: Its other arguments. A value that is on several devices must be on one, and gets unwrapped.
        kwargs: Its arguments by name, likewise.
        group: Whether to return what the function returns; otherwise each leaf of that comes as a tuple.

    Raises:
        ValueError: If it is no variable of this strategy, or an argument has a value for each replica.
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
    """Call ``fn(*args, **kwargs)`` once to change state that belongs to no one variable.

    Args:
        strategy: The strategy.
        colocate_with: Where the state lies: what `non_slot_devices` gave, or a device by its name.
        fn: The function.
        args: Its arguments, which are passed as they are.
        kwargs: Its arguments by name, likewise.
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
    """Variables that this thread creates in the ``with`` block go to the ps of this one, and take no turn.

    Raises:
        ValueError: If it is no variable of this strategy.
        RuntimeError: Outside of the strategy's scope.
    """
    context.check_scope(strategy, "colocate_vars_with")
    _check_variable(strategy, variable, "colocate_vars_with")
    return anchor.beside(variable)


def non_slot_devices(variables: Iterable[Variable]) -> Variable:
    """The variable of the smallest name: the same one on every worker.

    Raises:
        ValueError: If there is no variable.
    """
    return min(variables, key=lambda variable: variable.name)


def read_var(variable: Variable) -> torch.Tensor:
    """The present value of a variable, a copy; nothing is reduced."""
    return variable.value()


def value_container(value: Any) -> Any:
    """What aggregates a variable's values, as long as it is alive; for anything else the thing itself."""
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
