"""Variables of a program's own: named states on parameter servers, which the program's tasks read and assign to."""

from __future__ import annotations

import abc
import contextlib
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.devices import Device
from paramserver.distribute.core.values import DistributedValues
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.variables import anchor
from paramserver.distribute.variables.tensor_like import TensorLike
from paramserver.layout.variables import shown

Assignment = Literal["assign", "assign_add", "assign_sub"]


class VariableAggregation(enum.Enum):
    """The way to combine the values that the replicas of a worker assign to one variable.

    ``NONE``: replicas cannot assign. ``SUM`` and ``MEAN``: the sum or mean of their values is assigned once.
    ``ONLY_FIRST_REPLICA``: the value of replica 0 is assigned.
    """

    NONE = "NONE"
    SUM = "SUM"
    MEAN = "MEAN"
    ONLY_FIRST_REPLICA = "ONLY_FIRST_REPLICA"


@dataclass(frozen=True, kw_only=True)
class VariableOptions:
    """The arguments with which a program creates a variable; see `Variable`."""

    initial_value: Any
    name: str
    dtype: torch.dtype | None
    trainable: bool
    aggregation: VariableAggregation


class _Created(abc.ABCMeta):
    """Metaclass by which a call of `Variable` returns the subclass that the strategy in effect chooses."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _create(*args, **kwargs) if cls is Variable else super().__call__(*args, **kwargs)


class Variable(TensorLike, metaclass=_Created):
    """A named state on a parameter server, beside the model's. Created inside ``strategy.scope()``, also on replicas.

    Every worker creates the same variables in the same order. Every worker starts from the chief's initial value. Other
    workers wait until the chief has created the variable, so creation blocks. A chief that restarts finds the present
    value. Checkpoints save the variable with the model, and restore it if it was created before ``strategy.prepare``.

    Operators, torch functions and conversions work on the variable's value, and each of them reads the value anew from
    the ps: if you need it several times, read it once with `value`. The ps carries out assignments at once, each
    exactly once; none is lost, even if other tasks assign too. A value of more than `arena.BLOCK` elements is read and
    assigned block by block: assignments of other tasks may come between two blocks, never into one. Reading a value and
    assigning a result computed from it may undo assignments that other tasks made in between: use `assign_add`.

    With several replicas, the values that they assign are first combined by the variable's ``aggregation``. Not
    thread-safe.

    Every call that talks to a ps raises `UnavailableError` if the ps is lost, and `RefusedError` if the ps refuses.

    Args:
        initial_value: A tensor, a number, an array, or a function that returns one.
        name: ``Variable`` by default; a name that is taken gets a number, such as ``Variable_1``.
        dtype: By default that of the initial value.
        trainable: A mark for the program's own use.
        aggregation: The way to combine the values that replicas assign.
        name: Its unique name.
        shape: Its shape, fixed.
        dtype: Its dtype, fixed.
        device: Its device, such as ``/job:ps/task:1/device:CPU:0``; of a partitioned variable, that of its first rows.
        ps: The index of the ps of that device.
        trainable: As given.
        aggregation: As given.
        strategy: The strategy of the scope in which it was created.

    Raises:
        RuntimeError: Outside of all scopes, or if the replicas create it under different names.
        ValueError: If the aggregation is not a `VariableAggregation`, or a ps cannot hold the dtype.
        DeadlineError: If the chief has not created it within the strategy's ``session_creation_timeout``.
        ModelMismatchError: If the chief has created it with another shape or dtype.

    Example:
        >>> import paramserver as ps
        >>> with ps.ParameterServerStrategy().scope():
        ...     seen = ps.Variable(0, name="examples_seen", aggregation=ps.VariableAggregation.SUM)
        >>> seen.assign_add(32)
        tensor(32)
        >>> seen
        <ps.Variable 'examples_seen' int64[] on /device:CPU:0>
        >>> int(seen) // 10, seen / 64
        (3, tensor(0.5000))
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: str
    ps: int
    trainable: bool
    aggregation: VariableAggregation
    strategy: Worker
    container: Callable[[], Variable | None] = staticmethod(lambda: None)
    """Returns the wrapper that aggregates its replicas' values; None if there is none, or it is no longer alive."""

    if TYPE_CHECKING:

        def __init__(
            self,
            initial_value: Any,
            *,
            name: str | None = None,
            dtype: torch.dtype | None = None,
            trainable: bool = True,
            aggregation: VariableAggregation = VariableAggregation.NONE,
        ) -> None: ...

    # --- reading

    # Not abstract, although only subclasses implement it: to type checkers this is the class that a program creates.
    def value(self) -> torch.Tensor:
        """Return a copy of the present value; inside a replica, on the replica's device."""
        raise NotImplementedError

    def read_value(self) -> torch.Tensor:
        """Return a copy of the present value."""
        return self.value()

    def sparse_read(self, indices: Any) -> torch.Tensor:
        """Return a copy of some rows of the present value, of shape ``[len(indices), ...]``.

        Raises:
            ValueError: If the indices do not have exactly one dimension.
        """
        rows = torch.as_tensor(indices)
        if rows.ndim != 1:
            raise ValueError(f"sparse_read of variable {self.name!r}: expected indices of 1 dimension, got {rows.ndim}")
        value = self.value()
        return value[rows.to(value.device)]

    @property
    def distribute_strategy(self) -> Worker:
        """The strategy of the variable: another name of `strategy`."""
        return self.strategy

    # --- assigning

    def assign(self, value: Any) -> torch.Tensor:
        """Replace the value.

        On a replica, all replicas of the worker have to assign; the aggregation determines the result.

        Args:
            value: A tensor or an array of the variable's shape, or a number for all elements. Integers of another
                dtype, and whole floating-point values, are converted to its dtype. A floating-point variable accepts
                any real dtype.

        Returns:
            A copy of the value that this assignment produced.

        Raises:
            ValueError: If the value does not fit the variable's shape or dtype, if replicas assign and the aggregation
                is ``NONE``, or if the value is distributed over several replicas.
            RuntimeError: Inside the scope of another strategy.
        """
        return self._assign("assign", value)

    def assign_add(self, value: Any) -> torch.Tensor:
        """Add to the value; like `assign`, but raises ValueError for a variable of bools."""
        return self._assign("assign_add", value)

    def assign_sub(self, value: Any) -> torch.Tensor:
        """Subtract from the value; like `assign`, but raises ValueError for a variable of bools."""
        return self._assign("assign_sub", value)

    def _assign(self, assignment: Assignment, value: Any) -> torch.Tensor:
        self._check_strategy(assignment)
        return here(self._apply(assignment, self.fitted(assignment, value)))

    def _apply(self, assignment: Assignment, value: torch.Tensor) -> torch.Tensor:
        """Carry out an assignment of a value that fits, and return the result."""
        raise NotImplementedError

    def fitted(self, assignment: str, value: Any) -> torch.Tensor:
        """Return a value as a tensor of the shape and dtype of this variable.

        Args:
            assignment: The name of the call, for messages.
            value: As for `assign`.

        Raises:
            ValueError: If the value does not fit.
        """
        what = f"{assignment} to variable {self.name!r}"
        if isinstance(value, DistributedValues):
            raise ValueError(f"{what}: cannot update variable with a {type(value).__name__}; reduce it to one value")
        if self.dtype is torch.bool and assignment != "assign":
            raise ValueError(f"{what}: it holds bools, which cannot be added to; use assign")
        is_tensor = isinstance(value, (torch.Tensor, TensorLike))
        given = tensor_of(value if is_tensor else np.asarray(value), what)  # numpy keeps all digits of a number
        if given.shape != self.shape and (is_tensor or given.ndim):
            raise ValueError(
                f"{what}: expected a value of {shown(self.dtype, self.shape)}, got {shown(given.dtype, given.shape)}"
            )
        if not _can_hold(self.dtype, given):
            raise ValueError(f"{what}: expected values that {shown(self.dtype, self.shape)} can hold, got {given}")
        return given.to(self.dtype).expand(self.shape)

    def _check_strategy(self, call: str) -> None:
        if context.current() is not None:
            context.check_scope(self.strategy, f"{call} of variable {self.name!r}")

    # --- wrapping and copying

    def get(self) -> Variable:
        """Return the variable on the ps: this object itself, unless it is a wrapper."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        """Return a new variable with the same value on the same ps, in this variable's own strategy.

        Raises:
            RuntimeError: Inside the scope of another strategy.
        """
        self._check_strategy("deepcopy")
        in_scope = context.scope(self.strategy) if context.current() is None else contextlib.nullcontext()
        with in_scope, anchor.beside(self):
            memo[id(self)] = duplicate = Variable(
                self.value, name=self.name, trainable=self.trainable, aggregation=self.aggregation
            )
        return duplicate

    def __repr__(self) -> str:
        return f"<ps.Variable {self.name!r} {shown(self.dtype, self.shape)} on {self.device}>"


def tensor_of(value: Any, what: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a value as a plain tensor in the memory of this process, outside of autograd.

    Args:
        value: The value.
        what: The purpose of the value, for messages.
        dtype: By default that of the value.

    Raises:
        ValueError: If the value is not a tensor, a number or an array.
    """
    if isinstance(value, TensorLike):
        value = value.value()
    if isinstance(value, torch.Tensor):
        return _strided(value.detach()).cpu().to(dtype or value.dtype)
    try:
        return torch.tensor(value, dtype=dtype, device="cpu")  # not on the program's default device
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{what}: expected a tensor, a number or an array of numbers: {error}") from error


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def here(value: torch.Tensor) -> torch.Tensor:
    """Move a value to the device of this thread's replica; outside of replicas, leave it where it is."""
    replica = context.current_replica()
    return value if replica is None else value.to(Device.parse(replica.devices[0]).torch_device)


def _create(
    initial_value: Any,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    aggregation: VariableAggregation = VariableAggregation.NONE,
) -> Variable:
    name = "Variable" if name is None else name
    frame = context.current()
    if frame is None:
        raise RuntimeError(
            f"ps.Variable {name!r} lives on the parameter servers of a strategy: "
            "Need to be inside `with strategy.scope():`"
        )
    if not isinstance(aggregation, VariableAggregation):
        raise ValueError(
            f"ps.Variable {name!r}: invalid aggregation {aggregation!r}; expected a VariableAggregation: "
            f"{', '.join(VariableAggregation.__members__)}"
        )
    created: Variable = frame.strategy.create_variable(
        VariableOptions(
            initial_value=initial_value, name=name, dtype=dtype, trainable=trainable, aggregation=aggregation
        )
    )
    return created


def _can_hold(dtype: torch.dtype, given: torch.Tensor) -> bool:
    if given.is_complex():
        return False
    return dtype.is_floating_point or torch.equal(given.to(dtype).to(given.dtype), given)
