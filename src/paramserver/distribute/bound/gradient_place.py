"""The memory that one parameter's gradient is pushed from, and whether a program still refers to its contents.

Rules
    * A gradient in its place is handed out as a tensor over that memory, with a storage that no other parameter's
      gradient has. While anything else refers to the storage, some part of the program holds the gradient: a kept
      ``grad``, a detached alias, a view or a NumPy array. Nothing is written to the place meanwhile.
    * The views that the lanes read are never handed out. So no operation on a handed-out tensor, such as a move into
      torch's shared memory, can move them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramserver.memory.torch_internals import alias, storage_uses, uses_of_storage

_ALONE = storage_uses(torch.empty(1))
"""Number of uses of a storage that only one tensor refers to."""


class Gate:
    """Permission to write to gradient places: denied while the lanes may read them.

    Attributes:
        is_shut: Whether a push is under way, or was interrupted and is not yet completed.
    """

    __slots__ = ("is_shut",)

    def __init__(self) -> None:
        self.is_shut = False


class GradientPlace:
    """The memory for the gradient of one parameter. Not thread-safe.

    Args:
        parameter: The parameter.
        view: The memory, in the parameter's shape.
        gate: The permission to write to it.

    Attributes:
        view: The memory; never handed out.
        handed_out: The gradient that was last put here, if it may still be here.
        is_private: Whether each step copies the gradient here and never hands it out, because a program keeps it.
    """

    __slots__ = ("_alone", "_gate", "_own", "_storage", "address", "handed_out", "is_private", "parameter", "view")

    def __init__(self, parameter: Tensor, view: Tensor, gate: Gate) -> None:
        self.parameter = parameter
        self._gate = gate
        self.is_private = False
        self.move_to(view)

    def move_to(self, view: Tensor) -> None:
        """Use other memory from now on; a gradient that was handed out keeps the present memory."""
        self.view, self.address = view, view.data_ptr()
        self.handed_out: Tensor | None = None
        self._lend()

    @property
    def is_free(self) -> bool:
        """Whether nothing refers to the last gradient handed out. Ask only if the parameter has another gradient."""
        self.handed_out = None
        if self._own.data_ptr() != self.address:
            self._lend()  # a program has moved the gradient that it holds
        return uses_of_storage(self._storage) <= self._alone

    def take_for_backward(self) -> Tensor | None:
        """Return the place as a tensor to write a gradient into; None while it is in use.

        It is also in use while the parameter has a gradient, since the new gradient is added to that one.
        """
        if self.parameter.grad is not None or not self._is_open:
            return None
        return self._own.detach()

    def land(self, gradient: Tensor) -> None:
        """Move the parameter's complete gradient here, unless the place is in use.

        The tensor stays the same object. A program that has set it and still holds it therefore sees later additions.
        A gradient whose storage is shared with other tensors is left where it is.
        """
        if self.holds(gradient):
            self.handed_out = gradient  # the backward computed it here
        elif not gradient.requires_grad and storage_uses(gradient) <= _ALONE and self._is_open:
            self.view.copy_(gradient)
            gradient.data = self._own
            self.handed_out = gradient

    def holds(self, gradient: Tensor) -> bool:
        """Return whether this gradient of the parameter is in the place."""
        is_dense = gradient.layout is torch.strided  # other layouts have no address
        return is_dense and gradient.data_ptr() == self.address and gradient.is_contiguous()

    def evict(self) -> None:
        """Replace the gradient in this place by a copy that the program owns."""
        gradient = self.parameter.grad
        if gradient is not None and self.holds(gradient):
            self.parameter.grad = gradient.detach().clone()

    @property
    def _is_open(self) -> bool:
        return not self._gate.is_shut and not self.is_private and self.is_free

    def _lend(self) -> None:
        """Make a tensor through which gradients share the memory, with a storage that nothing else refers to."""
        self._own = alias(self.view)
        self._storage = self._own.untyped_storage()._cdata
        self._alone = uses_of_storage(self._storage)

    def __deepcopy__(self, memo: object) -> GradientPlace:
        return self  # it belongs to the original parameter; a copy of the model uses no place

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a model that was saved and loaded is plain PyTorch
