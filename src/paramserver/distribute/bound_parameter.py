"""One parameter of one replica, and its place in the memory that is pushed and pulled.

Rules
    * A whole parameter's values and gradient *are* the memory: autograd writes each gradient, and a hook puts it into
      its place as soon as it is whole, so that no second copy of the gradients is ever alive.
    * The smallest parameters, `LATE_BYTES` of an arena at most, have no hook: their gradients are brought home all at
      once when the next step begins.
    * Of a partitioned parameter the rows lie in the memories of several ps tasks, and a module needs them in one piece:
      it keeps memory of its own, and each part is copied into its place and back.
    * What a program puts in the place of a gradient or of ``parameter.data`` is brought home when the next step begins.
"""

from __future__ import annotations

import abc
import bisect
import itertools
import operator
from collections.abc import Callable, Sequence

import torch

from paramserver.arena import DTYPES, VariableSpec
from paramserver.distribute.variables import Member
from paramserver.errors import ConfigError

LATE_BYTES = 16 << 10
"""What a second copy of gradients may take. A hook costs two microseconds or more, as much as to copy 30 kB. More would
lie between a large model's activations until the step, and keep their memory from being used again in one piece."""


class BoundParameter(abc.ABC):
    """A parameter, or a part of one, in an arena.

    Attributes:
        tensor: The whole parameter.
    """

    __slots__ = ()
    tensor: torch.Tensor

    @abc.abstractmethod
    def has_gradient(self) -> bool:
        """Whether there is one; then it is in its place."""

    @abc.abstractmethod
    def bring_home(self) -> None:
        """What a program has put in the place of its values goes to where they lie."""

    @abc.abstractmethod
    def pulled(self) -> None:
        """The memory of its values is fresh."""


def bind(member: Member, tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> BoundParameter:
    """Bind a replica's tensor to its views of values and gradients."""
    if member.rows is None:
        return _WholeParameter(member.spec, tensor, value, gradient)
    return _PartOfParameter(member, tensor, value, gradient)


class BoundParameters:
    """The parameters of one arena, of one replica.

    In nearly every step all of them have a gradient, and nothing was put in anybody's place. That is seen here without
    asking each one, which would cost more than the push of many small parameters.

    Args:
        each: They, in the order of the arena.

    Attributes:
        tensors: The whole parameters, in that order.
    """

    def __init__(self, each: Sequence[BoundParameter]) -> None:
        self.tensors = [parameter.tensor for parameter in each]
        self._each = each
        self._all = [True] * len(each)
        whole = [parameter for parameter in each if isinstance(parameter, _WholeParameter)]
        self._are_whole = len(whole) == len(each)
        self._addresses = [parameter.address for parameter in whole]
        late, hooked = _by_size(whole, LATE_BYTES)
        self._late, self._hooked = _Gradients(late), _Gradients(hooked)
        self._hooked.land_when_whole()

    def present(self) -> list[bool]:
        """Which of them have a gradient; it is in its place then."""
        if self._are_whole and self._hooked.are_home() and self._late.land():
            return self._all
        return [parameter.has_gradient() for parameter in self._each]

    def bring_home(self) -> None:
        """What a program has put in the place of their values goes to where they lie."""
        if self._are_whole and list(map(torch.Tensor.data_ptr, self.tensors)) == self._addresses:
            return
        for parameter in self._each:
            parameter.bring_home()


class _Gradients:
    """The gradients of several whole parameters, looked at and moved together.

    Args:
        parameters: Whose.
    """

    def __init__(self, parameters: Sequence[_WholeParameter]) -> None:
        self._parameters = parameters
        self._tensors = [parameter.tensor for parameter in parameters]
        self._places = [parameter.gradient for parameter in parameters]

    def are_home(self) -> bool:
        """Whether each is the very tensor that lies in its place."""
        return all(map(operator.is_, [tensor.grad for tensor in self._tensors], self._places))

    def land(self) -> bool:
        """Bring each to its place; False, and nothing is done, unless all are there and are what is expected."""
        found = [tensor.grad for tensor in self._tensors]
        plain = [
            one
            for one, place in zip(found, self._places, strict=True)
            if one is not None and one.layout is torch.strided and one.dtype is place.dtype and not one.requires_grad
        ]
        if len(plain) < len(found):
            return False
        if plain:
            torch._foreach_copy_(self._places, plain)
            for tensor, place in zip(self._tensors, self._places, strict=True):
                tensor.grad = place  # autograd's own memory is free for the next step, and not in the way of other
        return True

    def land_when_whole(self) -> None:
        """From now on autograd has each of them brought to its place as soon as it is whole."""
        for parameter in self._parameters:
            parameter.land_when_whole()


def _by_size(
    parameters: Sequence[_WholeParameter], nbytes: int
) -> tuple[Sequence[_WholeParameter], Sequence[_WholeParameter]]:
    """As many of the smallest ones as have less than ``nbytes`` together, and the rest."""
    ascending = sorted(parameters, key=lambda parameter: parameter.gradient.nbytes)
    totals = list(itertools.accumulate(parameter.gradient.nbytes for parameter in ascending))
    count = bisect.bisect_left(totals, nbytes)
    return ascending[:count], ascending[count:]


class _WholeParameter(BoundParameter):
    """The views themselves are the parameter's data and gradient.

    Attributes:
        address: Where its values lie.
        gradient: The place of its gradient.
    """

    __slots__ = ("_land", "_spec", "_value", "address", "gradient", "tensor")

    def __init__(self, spec: VariableSpec, tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> None:
        self.tensor = tensor
        self._spec = spec
        self._value = value
        self.gradient = gradient
        self.tensor.data = value
        self.address = self.tensor.data_ptr()
        self._land = _lander(self._spec, self.gradient)

    def has_gradient(self) -> bool:
        gradient = self.tensor.grad
        if gradient is None:
            return False
        if gradient is not self.gradient:
            same_kind(self._spec, self.tensor)
            self._land(self.tensor)
        return True

    def bring_home(self) -> None:
        if self.tensor.data_ptr() != self.address:
            self._value.copy_(same_kind(self._spec, self.tensor).detach())
            self.tensor.data = self._value

    def pulled(self) -> None:
        """The memory is the parameter."""

    def land_when_whole(self) -> None:
        """From now on autograd has its gradient brought to its place as soon as it is whole."""
        frozen = not self.tensor.requires_grad  # torch refuses the hook then, and would call it if trained later
        self.tensor.requires_grad_(True)
        self.tensor.register_post_accumulate_grad_hook(self._land)  # type: ignore[no-untyped-call]  # torch has no type
        self.tensor.requires_grad_(not frozen)


class _PartOfParameter(BoundParameter):
    """Rows of a parameter that has its memory to itself."""

    def __init__(self, member: Member, tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> None:
        assert member.rows is not None  # noqa: S101  # a part has rows
        self.tensor = tensor
        self._spec = member.variable.spec
        self._rows = slice(*member.rows)
        self._whole = tensor.detach()
        self._value = value
        self._gradient = gradient

    def has_gradient(self) -> bool:
        gradient = same_kind(self._spec, self.tensor).grad
        if gradient is None:
            return False
        _check_dense(self._spec, gradient)
        self._gradient.copy_(gradient.detach()[self._rows])
        return True

    def bring_home(self) -> None:
        found = same_kind(self._spec, self.tensor)
        if found.data_ptr() != self._whole.data_ptr():
            self._whole.copy_(found.detach())
            self.tensor.data = self._whole

    def pulled(self) -> None:
        self._whole[self._rows].copy_(self._value)


def same_kind(spec: VariableSpec, found: torch.Tensor | None) -> torch.Tensor:
    """What was found in the place of a variable.

    Raises:
        ConfigError: If it is nothing, or of another shape or dtype.
    """
    if found is None or found.shape != spec.shape or found.dtype is not DTYPES[spec.dtype]:
        got = "nothing" if found is None else f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
        raise ConfigError(
            f"variable {spec.name!r} is {spec.dtype}{list(spec.shape)} on its ps, and the model has {got} in its "
            "place; a variable keeps its shape and dtype after prepare, convert the model before"
        )
    return found


def _lander(spec: VariableSpec, view: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """What puts a parameter's gradient into its place; autograd calls it as soon as the gradient is whole."""
    address = view.data_ptr()

    def land(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient is view:
            return
        _check_dense(spec, gradient)
        if gradient.dtype is not view.dtype:
            same_kind(spec, parameter)
        if gradient.data_ptr() != address:  # else a large layer has computed it in its place
            view.copy_(gradient.detach() if gradient.requires_grad else gradient)
        parameter.grad = view

    return land


def _check_dense(spec: VariableSpec, gradient: torch.Tensor) -> None:
    if gradient.layout is not torch.strided:
        raise NotImplementedError(
            f"variable {spec.name!r} got a sparse gradient, and it is no table: not only nn.Embedding(sparse=True) and "
            "nn.EmbeddingBag(sparse=True) use it; make them sparse=False"
        )
