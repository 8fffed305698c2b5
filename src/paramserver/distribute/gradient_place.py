"""The memory that one parameter's gradient is pushed from, and whether a program still refers to what lies there.

Rules
    * A gradient that lies in its place is handed out as a tensor with a storage of its own over that memory. As long
      as the storage lives, some part of the program refers to the gradient: a kept ``grad``, a detached alias, a view
      or a NumPy array. Nothing is written to the place meanwhile.
    * The views that the lanes read are never handed out. Whatever a program does to a tensor that it got, such as to
      move it into torch's shared memory, leaves them where they are.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paramserver.distribute.torch_internals import alias, storage_uses

if TYPE_CHECKING:
    from torch import UntypedStorage


_ALONE = storage_uses(torch.empty(1))
"""Uses of a storage that one tensor alone refers to."""


class Gate:
    """Whether places may be written: not while the lanes may read them.

    Attributes:
        is_shut: Whether a push is under way, or was interrupted and is not made up for.
    """

    __slots__ = ("is_shut",)

    def __init__(self) -> None:
        self.is_shut = False


class GradientPlace:
    """Where the gradient of one parameter belongs. Not thread-safe.

    Args:
        parameter: The parameter.
        view: Its place, of its shape.
        gate: Whether it may be written.

    Attributes:
        view: The place; never handed out.
        is_private: Whether gradients are copied here by each step and never handed out: a program keeps them.
    """

    __slots__ = ("_gate", "_handed_out", "_storage", "is_private", "parameter", "view")

    def __init__(self, parameter: Tensor, view: Tensor, gate: Gate) -> None:
        self.parameter = parameter
        self._gate = gate
        self.is_private = False
        self.move_to(view)

    def move_to(self, view: Tensor) -> None:
        """Go on with other memory; what was handed out keeps the present one."""
        self.view = view
        self._handed_out: Tensor | None = None
        self._storage: weakref.ref[UntypedStorage] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nothing refers to what was handed out last; asked only when the parameter has another gradient."""
        self._handed_out = None
        return self._storage is None or self._storage() is None

    def take(self) -> Tensor | None:
        """Return the place as a tensor to write a new gradient into; None while it is in use."""
        if self._gate.is_shut or self.is_private or not self.is_free:
            return None
        handed_out = alias(self.view)
        self._storage = weakref.ref(handed_out.untyped_storage())
        return handed_out

    def take_for_backward(self) -> Tensor | None:
        """`take`, in the middle of a backward: None also if there is a gradient, to which this one is added."""
        return None if self.parameter.grad is not None else self.take()

    def land(self, gradient: Tensor) -> None:
        """Have the parameter's gradient lie here, now that it is whole, unless the place is in use.

        The tensor stays the same object. So a program that has put it there itself, and goes on to hold it, sees what
        is added to it; where others share its storage, it is left where it is.
        """
        if self.holds(gradient):
            self._handed_out = gradient  # it was computed here
        elif not gradient.requires_grad and storage_uses(gradient) <= _ALONE and (target := self.take()) is not None:
            gradient.data = target.copy_(gradient)
            self._handed_out = gradient

    def is_home(self, gradient: Tensor | None) -> bool:
        """Whether this gradient of the parameter is the one that was put here last; quicker than `holds`."""
        return gradient is not None and gradient is self._handed_out and gradient.data_ptr() == self.view.data_ptr()

    def holds(self, gradient: Tensor) -> bool:
        """Whether this gradient of the parameter lies here."""
        is_dense = gradient.layout is torch.strided  # others have no address
        return is_dense and gradient.data_ptr() == self.view.data_ptr() and gradient.is_contiguous()

    def evict(self) -> None:
        """Give the parameter a gradient of its own in the place of the one that lies here."""
        gradient = self.parameter.grad
        if gradient is not None and self.holds(gradient):
            self.parameter.grad = gradient.detach().clone()

    def __deepcopy__(self, memo: object) -> GradientPlace:
        return self  # of the parameter that it belongs to; a copy of the model has none

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a model that was saved and loaded is plain PyTorch
