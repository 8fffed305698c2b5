"""Variables of a program's own: named states on parameter servers, which its tasks read and assign to."""

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
    """What becomes of the values that the replicas of a worker assign to one variable.

    ``NONE``: they cannot; ``SUM`` and ``MEAN``: their sum or mean is assigned, once; ``ONLY_FIRST_REPLICA``: that of
    replica 0 is.
    """

    NONE = "NONE"
    SUM = "SUM"
    MEAN = "MEAN"
    ONLY_FIRST_REPLICA = "ONLY_FIRST_REPLICA"


@dataclass(frozen=True, kw_only=True)
class VariableOptions:
    """What a program asks for when it creates a variable; see `Variable`."""

    initial_value: Any
    name: str
    dtype: torch.dtype | None
    trainable: bool
    aggregation: VariableAggregation


class _Created(abc.ABCMeta):
    """Calling `Variable` itself gives what the strategy in effect makes of it: one of its subclasses."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _create(*args, **kwargs) if cls is Variable else super().__call__(*args, **kwargs)


class Variable(TensorLike, metaclass=_Created):
    """A named state on a parameter server, beside the model's. Created inside ``strategy.scope()``, also on replicas.

    Every worker creates the same variables in the same order. The chief's initial value becomes everyone's; other
    workers wait until the chief has created it, so creation blocks. A chief that starts again finds the present value.
    It is saved with the model by checkpoints, and restored by them where it was created before ``strategy.prepare``.

    Operators, torch functions and conversions work on its value, which each of them reads anew from its ps: read it
    once, with `value`, where it is needed several times. Assignments are carried out by the ps that holds it, at once,
    each exactly once; none is lost, whoever else assigns. A value of more than `arena.BLOCK` elements is read and
    assigned block by block: others' assignments may come between two blocks, never into one. What a program computes
    from a value that it has read, and assigns, may undo what others assigned meanwhile: use `assign_add`.

    With one replica it lies plainly on its ps. With several, each of which assigns, their values become one by its
    ``aggregation`` first. Not thread-safe.

    Everything that talks to a ps raises `UnavailableError` if the ps is lost, `RefusedError` if it refuses.

    Args:
        initial_value: A tensor, a number, an array, or a function that returns one.
        name: ``Variable`` by default; a number is put behind one that is taken, such as ``Variable_1``.
        dtype: By default that of the initial value.
        trainable: A mark for the program's own use.
        aggregation: What becomes of the values that replicas assign.

    Attributes:
        name: Its unique name.
        shape: Its shape, fixed.
        dtype: Its dtype, fixed.
        device: Where it lies, ``/job:ps/task:1/device:CPU:0``; of one that is partitioned, where its first rows do.
        ps: The index of that ps.
        trainable: As given.
        aggregation: As given.
        strategy: Whose it is.

    Raises:
        RuntimeError: Outside of all scopes, or if the replicas create it by different names.
        ValueError: If the aggregation is none, or a ps cannot hold the dtype.
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
    """What aggregates its replicas' values, if anything does and is still alive."""

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

    # Not abstract, though only subclasses have it: for type checkers this is the class that a program makes one of.
    def value(self) -> torch.Tensor:
        """The present value, a copy; inside a replica it lies on the replica's device."""
        raise NotImplementedError

    def read_value(self) -> torch.Tensor:
        """The present value, a copy."""
        return self.value()

    def sparse_read(self, indices: Any) -> torch.Tensor:
        """Some rows of the present value, ``[len(indices), ...]``.

        Raises:
            ValueError: If the indices have not one dimension.
        """
        rows = torch.as_tensor(indices)
        if rows.ndim != 1:
            raise ValueError(f"sparse_read of variable {self.name!r}: expected indices of 1 dimension, got {rows.ndim}")
        value = self.value()
        return value[rows.to(value.device)]

    @property
    def distribute_strategy(self) -> Worker:
        """Whose it is: `strategy`, by its other name."""
        return self.strategy

    # --- assigning

    def assign(self, value: Any) -> torch.Tensor:
        """Replace its value.

        On a replica, all replicas of the worker have to assign; what becomes of it then depends on the aggregation.

        Args:
            value: A tensor or an array of its shape, or a number for all elements. Integers of another dtype, and
                floating values that are whole, become its dtype; so does anything for a floating variable.

        Returns:
            What this assignment made of it, a copy.

        Raises:
            ValueError: If the value does not fit its shape or dtype, if replicas assign and the aggregation is
                ``NONE``, or for a value of several replicas.
            RuntimeError: Inside the scope of another strategy.
        """
        return self._assign("assign", value)

    def assign_add(self, value: Any) -> torch.Tensor:
        """Add to its value; as `assign`, and a variable of bools raises ValueError."""
        return self._assign("assign_add", value)

    def assign_sub(self, value: Any) -> torch.Tensor:
        """Subtract from its value; as `assign`, and a variable of bools raises ValueError."""
        return self._assign("assign_sub", value)

    def _assign(self, assignment: Assignment, value: Any) -> torch.Tensor:
        self._check_strategy(assignment)
        return here(self._apply(assignment, self.fitted(assignment, value)))

    def _apply(self, assignment: Assignment, value: torch.Tensor) -> torch.Tensor:
        """Carry out an assignment of a value that fits; the result."""
        raise NotImplementedError

    def fitted(self, assignment: str, value: Any) -> torch.Tensor:
        """A value as a tensor of the shape and dtype of this variable.

        Args:
            assignment: What it is for, for messages.
            value: As for `assign`.

        Raises:
            ValueError: If it does not fit.
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
        """What lies on the ps: itself, where nothing is wrapped around it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        """A new variable beside this one, of the same value; under its own strategy or none."""
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
    """A value as a plain tensor in the memory of this process, outside of autograd.

    Args:
        value: The value.
        what: What it is for, for messages.
        dtype: By default that of the value.

    Raises:
        ValueError: If it is no tensor, number or array.
    """
    if isinstance(value, TensorLike):
        value = value.value()
    if isinstance(value, torch.Tensor):
        return _strided(value.detach()).cpu().to(dtype or value.dtype)
    try:
        return torch.tensor(value, dtype=dtype, device="cpu")  # whatever device the program is on
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{what}: expected a tensor, a number or an array of numbers: {error}") from error


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def here(value: torch.Tensor) -> torch.Tensor:
    """A value on the device of the replica that asks for it; outside of replicas where it is."""
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
