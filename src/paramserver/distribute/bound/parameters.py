"""One parameter of one replica, and its place in the memory that is pushed and pulled.

Rules
    * A whole parameter's values *are* the memory. A hook puts its gradient into its place as soon as the gradient is
      complete, so that no second copy of the gradients is ever alive; from there it is handed out (see
      `gradient_place`).
    * The smallest parameters, `LATE_BYTES` of an arena at most, have no hook: their gradients are copied when a step
      begins.
    * A gradient that is elsewhere when a step begins is copied to its place; the program's tensor stays where it is.
    * The rows of a partitioned parameter are in the memories of several ps tasks, but a module needs them in one piece;
      a parameter in a memory layout other than row by row has the same need. Such a parameter keeps memory of its own,
      and each part is copied into its place and back. So does a parameter whose memory a program has moved or shared.
    * A program that writes other values into a parameter is refused; see `value_watch`.
"""

from __future__ import annotations

import abc
import bisect
import itertools
import operator
from collections.abc import Callable, Sequence
from itertools import compress

import torch

from paramserver.distribute.bound.gradient_place import Gate, GradientPlace
from paramserver.distribute.bound.plan import Member
from paramserver.distribute.bound.value_watch import ValueWatch, edited
from paramserver.errors import ConfigError
from paramserver.layout.variables import DTYPES, VariableSpec
from paramserver.memory.torch_internals import alias, foreach_copy

LATE_BYTES = 16 << 10
"""Largest size of a second copy of gradients. A hook costs two microseconds or more, as much as to copy 30 kB. With a
larger size, gradients would lie between a large model's activations until the step, and fragment that memory."""


class BoundParameter(abc.ABC):
    """A parameter, or a part of one, in an arena.

    Attributes:
        name: The name of the whole variable.
        tensor: The whole parameter.
        is_apart: Whether it keeps memory of its own, apart from that of the values.
        is_watched: Whether this part detects the program's writes to the whole parameter.
    """

    __slots__ = ()
    name: str
    tensor: torch.Tensor
    is_apart: bool
    is_watched: bool

    @abc.abstractmethod
    def is_blocked(self) -> bool:
        """Return whether the gradient has to be copied to a place that a program still refers to."""

    @abc.abstractmethod
    def gather(self) -> bool:
        """Copy the gradient to its place unless it is there already; return whether there is one."""

    @abc.abstractmethod
    def use_gradients(self, view: torch.Tensor) -> None:
        """Use another place for the gradient from now on."""

    @abc.abstractmethod
    def check_values(self) -> None:
        """Accept memory that a program has moved the values to.

        Raises:
            EditedError: If the values there differ.
        """

    @abc.abstractmethod
    def adopt(self) -> None:
        """Accept memory that a program has moved the values to, together with the values there."""

    @abc.abstractmethod
    def pulled(self) -> None:
        """Use the fresh memory of the values."""


def bind(
    member: Member, tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, gate: Gate
) -> BoundParameter:
    """Bind a replica's tensor to its views of values and gradients."""
    if member.rows is None and tensor.is_contiguous():
        return WholeParameter(member.spec, tensor, value, GradientPlace(tensor, gradient, gate))
    return _ApartParameter(member, tensor, value, gradient)


class BoundParameters:
    """The parameters of one arena, of one replica.

    In nearly every step all of them have a gradient, and the program has replaced none. This class sees that without
    asking each parameter, which would cost more than the push of many small parameters.

    Args:
        each: The parameters, in the order of the arena.

    Attributes:
        each: The parameters.
    """

    def __init__(self, each: Sequence[BoundParameter]) -> None:
        self.each = each
        self._tensors = [parameter.tensor for parameter in each]
        self._all = [True] * len(each)
        self._whole = [parameter for parameter in each if isinstance(parameter, WholeParameter)]
        self._are_whole = len(self._whole) == len(each)
        self._addresses = [parameter.tensor.data_ptr() for parameter in each]
        self._is_watched = [parameter.is_watched for parameter in each]
        watched = list(compress(each, self._is_watched))
        self._watched = [parameter.tensor for parameter in watched]
        self._watch = ValueWatch([parameter.name for parameter in watched], self._watched)
        late, hooked = _by_size(self._whole, LATE_BYTES)
        self._late, self._hooked = _LateGradients(late), _HookedGradients(hooked)

    def gather(self) -> list[bool] | None:
        """Put every gradient into its place; return for each parameter whether it has one.

        Does nothing and returns None if a program refers to gradients in places that have to be written; then
        `use_gradients` has to provide other places.
        """
        if self._are_whole and self._hooked.are_home() and self._late.gather():
            return self._all
        blocked = [parameter for parameter in self._whole if parameter.is_blocked()]
        if blocked:
            for parameter in blocked:
                parameter.place.is_private = True
            return None
        return [parameter.gather() for parameter in self.each]

    def use_gradients(self, views: Sequence[torch.Tensor]) -> None:
        """Go on with other places for the gradients; see `BoundParameter.use_gradients`."""
        for parameter, view in zip(self.each, views, strict=True):
            parameter.use_gradients(view)
        self._late.find_places()
        self._hooked.find_places()

    def check_values(self) -> bool:
        """Check before a step that the program has written no values; return whether it has moved some.

        Raises:
            EditedError: If the program has written values; the message names a parameter.
        """
        self._watch.check()
        addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        if addresses == self._addresses:
            return False
        for parameter in self.each:
            parameter.check_values()
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        return True

    def adopt(self) -> None:
        """Accept memory that the program has moved values to, together with the values there."""
        for parameter in self.each:
            parameter.adopt()
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))

    def advance(self, moved: Sequence[bool]) -> None:
        """Count a write by the lanes to the memory of the moved parameters; see `ValueWatch.advance`."""
        if all(moved):
            self._watch.advance(self._watched)
        else:
            self._watch.advance(list(compress(self._watched, compress(moved, self._is_watched))))

    def take_for_fresh(self) -> None:
        """Regard the present values as the ps tasks'."""
        self._watch.reset()


class _HookedGradients:
    """Gradients that hooks put into their places.

    Args:
        parameters: The parameters of these gradients.
    """

    def __init__(self, parameters: Sequence[WholeParameter]) -> None:
        self._places = [parameter.place for parameter in parameters]
        self._tensors = [parameter.tensor for parameter in parameters]
        self.find_places()
        for parameter in parameters:
            parameter.land_when_whole()

    def are_home(self) -> bool:
        """Return whether each gradient is in its place."""
        found = [tensor.grad for tensor in self._tensors]
        if not all(map(operator.is_, found, [place.handed_out for place in self._places])):
            return False
        try:
            return list(map(torch.Tensor.data_ptr, found)) == self._addresses  # type: ignore[arg-type]  # or it raises
        except TypeError:  # a gradient is None
            return False

    def find_places(self) -> None:
        """Note the addresses of the places."""
        self._addresses = [place.address for place in self._places]


class _LateGradients:
    """Gradients that are copied to their places together, and never handed out from there.

    Args:
        parameters: The parameters of these gradients.
    """

    def __init__(self, parameters: Sequence[WholeParameter]) -> None:
        self._parameters = parameters
        self._tensors = [parameter.tensor for parameter in parameters]
        self.find_places()

    def find_places(self) -> None:
        """Note the views of the places."""
        self._views = [parameter.place.view for parameter in self._parameters]

    def gather(self) -> bool:
        """Copy each gradient to its place; do nothing and return False if one is missing or unusual."""
        found = [tensor.grad for tensor in self._tensors]
        plain = [
            one
            for one, view in zip(found, self._views, strict=True)
            if one is not None and one.layout is torch.strided and one.dtype is view.dtype and not one.requires_grad
        ]
        if len(plain) < len(found):
            return False
        if plain:
            foreach_copy(self._views, plain)
        return True


def _by_size(
    parameters: Sequence[WholeParameter], nbytes: int
) -> tuple[Sequence[WholeParameter], Sequence[WholeParameter]]:
    """Divide parameters into as many of the smallest as have less than ``nbytes`` together, and the rest."""
    ascending = sorted(parameters, key=lambda parameter: parameter.place.view.nbytes)
    totals = list(itertools.accumulate(parameter.place.view.nbytes for parameter in ascending))
    count = bisect.bisect_left(totals, nbytes)
    return ascending[:count], ascending[count:]


class WholeParameter(BoundParameter):
    """A parameter whose data are the memory of the values, unless a program has moved them.

    Attributes:
        place: The place of its gradient.
    """

    __slots__ = ("_address", "_spec", "_value", "is_apart", "name", "place", "tensor")
    is_watched = True

    def __init__(self, spec: VariableSpec, tensor: torch.Tensor, value: torch.Tensor, place: GradientPlace) -> None:
        self.name = spec.name
        self.tensor = tensor
        self.is_apart = False
        self._spec = spec
        self._value = value
        self.place = place
        self.tensor.data = alias(value)
        self._address = self.tensor.data_ptr()

    def is_blocked(self) -> bool:
        gradient = self.tensor.grad
        return gradient is not None and not self.place.holds(gradient) and not self.place.is_free

    def gather(self) -> bool:
        gradient = self.tensor.grad
        if gradient is None:
            return False
        if not self.place.holds(gradient):
            same_kind(self._spec, self.tensor)
            self.place.view.copy_(dense(self._spec, gradient))
        return True

    def use_gradients(self, view: torch.Tensor) -> None:
        self.place.move_to(view)

    def check_values(self) -> None:
        found = same_kind(self._spec, self.tensor).detach()
        if found.data_ptr() != self._address:
            _check_moved(self.name, found, self._value)
            self.adopt()

    def adopt(self) -> None:
        address = self.tensor.data_ptr()
        if address != self._address:
            self.is_apart, self._address = True, address

    def pulled(self) -> None:
        """Copy the values if the parameter is apart; otherwise the memory is the parameter, and nothing is to do."""
        if self.is_apart:
            alias(self.tensor.detach()).copy_(self._value)  # not counted by autograd: the watch counts the step itself

    def land_when_whole(self) -> None:
        """Have autograd put the gradient into its place as soon as it is complete."""
        frozen = not self.tensor.requires_grad  # torch refuses the hook then, but calls it if trained later
        self.tensor.requires_grad_(True)
        land = _lander(self._spec, self.place)
        self.tensor.register_post_accumulate_grad_hook(land)  # type: ignore[no-untyped-call]  # torch has no type
        self.tensor.requires_grad_(not frozen)


class _ApartParameter(BoundParameter):
    """A parameter, or rows of one, with memory of its own."""

    __slots__ = ("_gradient", "_rows", "_spec", "_value", "_whole", "is_apart", "is_watched", "name", "tensor")

    def __init__(self, member: Member, tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> None:
        self._spec = member.variable.spec
        self.name = self._spec.name
        self.tensor = tensor
        self.is_apart = True
        self.is_watched = member.rows is None or member.rows[0] == 0
        self._rows = slice(*member.rows) if member.rows else ...
        self._whole = alias(tensor.detach())
        self._value = value
        self._gradient = gradient

    def is_blocked(self) -> bool:
        return False

    def gather(self) -> bool:
        gradient = same_kind(self._spec, self.tensor).grad
        if gradient is None:
            return False
        self._gradient.copy_(dense(self._spec, gradient)[self._rows])
        return True

    def use_gradients(self, view: torch.Tensor) -> None:
        self._gradient = view

    def check_values(self) -> None:
        found = same_kind(self._spec, self.tensor).detach()
        if found.data_ptr() != self._whole.data_ptr():
            _check_moved(self.name, found[self._rows], self._value)
            self.adopt()

    def adopt(self) -> None:
        self._whole = alias(same_kind(self._spec, self.tensor).detach())

    def pulled(self) -> None:
        self._whole[self._rows].copy_(self._value)


ADVICE = "a variable keeps its shape and dtype after prepare, convert the model before"


def same_kind(spec: VariableSpec, found: torch.Tensor | None, advice: str = ADVICE) -> torch.Tensor:
    """Return the tensor found in the place of a variable, if it has the variable's shape and dtype.

    Args:
        spec: The variable.
        found: The tensor; None if there is none.
        advice: The end of the error message: what to do instead.

    Raises:
        ConfigError: If there is no tensor, or one of another shape or dtype.
    """
    if found is None or found.shape != spec.shape or found.dtype is not DTYPES[spec.dtype]:
        got = "nothing" if found is None else f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
        raise ConfigError(
            f"variable {spec.name!r} is {spec.dtype}{list(spec.shape)} on its ps, and the model has {got} in its "
            f"place; {advice}"
        )
    return found


def dense(spec: VariableSpec, gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient without its graph.

    Raises:
        NotImplementedError: If it is sparse.
    """
    if gradient.layout is not torch.strided:
        raise NotImplementedError(
            f"variable {spec.name!r} got a sparse gradient but is not a table, because other modules than "
            "nn.Embedding(sparse=True) and nn.EmbeddingBag(sparse=True) use it; make these sparse=False"
        )
    return gradient.detach()


def _lander(spec: VariableSpec, place: GradientPlace) -> Callable[[torch.Tensor], None]:
    """Return a hook for autograd that puts a parameter's complete gradient into its place."""

    def land(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            if gradient.layout is not torch.strided:
                dense(spec, gradient)
            if gradient.dtype is not place.view.dtype:
                same_kind(spec, parameter)
            place.land(gradient)

    return land


def _check_moved(name: str, found: torch.Tensor, value: torch.Tensor) -> None:
    """Raise `EditedError` unless a program has only moved the values; two NaNs are equal."""
    moved = found.to(value.device)
    if not torch.equal(moved, value) and not bool(((moved == value) | (moved.isnan() & value.isnan())).all()):
        raise edited(name)
