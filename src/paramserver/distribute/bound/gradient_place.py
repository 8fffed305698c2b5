"""The memory that one parameter's gradient is pushed from, and whether a program still refers to what lies there.

Rules
    * A gradient that lies in its place is handed out as a tensor over that memory, with a storage that no other
      parameter's gradient has. While anything else refers to the storage, some part of the program holds the gradient:
      a kept ``grad``, a detached alias, a view or a NumPy array. Nothing is written to the place meanwhile.
    * The views that the lanes read are never handed out. Whatever a program does to a tensor that it got, such as to
      move it into torch's shared memory, leaves them where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramserver.memory.torch_internals import alias, storage_uses, uses_of_storage

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
        handed_out: The gradient that was put here last, if it may still be here.
        is_private: Whether gradients are copied here by each step and never handed out: a program keeps them.
    """

    __slots__ = ("_alone", "_gate", "_own", "_storage", "address", "handed_out", "is_private", "parameter", "view")

    def __init__(self, parameter: Tensor, view: Tensor, gate: Gate) -> None:
        self.parameter = parameter
        self._gate = gate
        self.is_private = False
        self.move_to(view)

    def move_to(self, view: Tensor) -> None:
        """Go on with other memory; what was handed out keeps the present one."""
        self.view, self.address = view, view.data_ptr()
        self.handed_out: Tensor | None = None
        self._lend()

    @property
    def is_free(self) -> bool:
        """Whether nothing refers to what was handed out last; asked only when the parameter has another gradient."""
        self.handed_out = None
        if self._own.data_ptr() != self.address:
            self._lend()  # a program has moved what it holds
        return uses_of_storage(self._storage) <= self._alone

    def take_for_backward(self) -> Tensor | None:
        """Return the place as a tensor to write a gradient into; None while it is in use.

        It is in use also while the parameter has a gradient, to which the new one is added.
        """
        if self.parameter.grad is not None or not self._is_open:
            return None
        return self._own.detach()

    def land(self, gradient: Tensor) -> None:
        """Have the parameter's gradient lie here, now that it is whole, unless the place is in use.

        The tensor stays the same object. So a program that has put it there itself, and goes on to hold it, sees what
        is added to it; where others share its storage, it is left where it is.
        """
        if self.holds(gradient):
            self.handed_out = gradient  # it was computed here
        elif not gradient.requires_grad and storage_uses(gradient) <= _ALONE and self._is_open:
            self.view.copy_(gradient)
            gradient.data = self._own
            self.handed_out = gradient

    def holds(self, gradient: Tensor) -> bool:
        """Whether this gradient of the parameter lies here."""
        is_dense = gradient.layout is torch.strided  # others have no address
        return is_dense and gradient.data_ptr() == self.address and gradient.is_contiguous()

    def evict(self) -> None:
        """Give the parameter a gradient of its own in the place of the one that lies here."""
        gradient = self.parameter.grad
        if gradient is not None and self.holds(gradient):
            self.parameter.grad = gradient.detach().clone()

    @property
    def _is_open(self) -> bool:
        return not self._gate.is_shut and not self.is_private and self.is_free

    def _lend(self) -> None:
        """Make a tensor that gradients share the memory with, of a storage that nothing else refers to."""
        self._own = alias(self.view)
        self._storage = self._own.untyped_storage()._cdata
        self._alone = uses_of_storage(self._storage)

    def __deepcopy__(self, memo: object) -> GradientPlace:
        return self  # of the parameter that it belongs to; a copy of the model has none

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a model that was saved and loaded is plain PyTorch
