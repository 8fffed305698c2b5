"""Large linear layers whose weight gradient is computed in the memory that is pushed.

Autograd makes every gradient in new memory, from which it has to be copied to its place. For a large weight that is a
second gradient for a moment, and pages that the kernel has to clear. Here the backward of ``nn.Linear`` is given the
place itself to write to, and what it hands to autograd is a view of it; everything that autograd does with gradients
(hooks, accumulation, ``autograd.grad``, double backward) goes on as ever.

Rules
    * The place is written only while the parameter has no gradient and nobody holds a gradient that was put there;
      else the backward makes its gradient in new memory, as torch does.
    * Under autocast, ``torch.compile`` and torch.func transforms the layer is torch's own.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 20
"""Bytes of a weight from which it pays: below, the copy is cheaper than a Python function in the backward."""


class GradientPlace:
    """Where the gradient of one parameter belongs.

    Args:
        parameter: The parameter.
        view: Its place, of its shape.
    """

    def __init__(self, parameter: Tensor, view: Tensor) -> None:
        self.parameter = parameter
        self.view = view
        self._given: weakref.ref[Tensor] | None = None

    def take(self) -> Tensor | None:
        """The place as a tensor to write a gradient into; None while it is in use."""
        if self.parameter.grad is not None or (self._given is not None and self._given() is not None):
            return None
        given = self.view.detach()
        self._given = weakref.ref(given)
        return given


def make_direct(model: nn.Module, places: dict[int, GradientPlace]) -> None:
    """Have every large ``nn.Linear`` of a model compute its weight gradient in its place.

    Args:
        model: Its modules are changed: those whose class is ``nn.Linear`` itself.
        places: By the id of the parameter.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            place = places.get(id(module.weight))
            if place is not None and place.view.nbytes >= LARGE:
                module.forward = functools.partial(_forward, module, place)  # type: ignore[method-assign]


def _forward(module: nn.Linear, place: GradientPlace, features: Tensor) -> Tensor:
    if module.weight is not place.parameter or not torch.is_grad_enabled() or _is_special():
        return F.linear(features, module.weight, module.bias)
    output: Tensor = _DirectLinear.apply(features, module.weight, module.bias, place)  # type: ignore[no-untyped-call]
    return output


def _is_special() -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _DirectLinear(torch.autograd.Function):
    """``F.linear`` with a place for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, place: GradientPlace) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.place = place
        return F.linear(features, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        needs_features, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient @ weight if needs_features else None,
            _weight_gradient(ctx.place, rows, features.reshape(-1, features.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


def _weight_gradient(place: GradientPlace, rows: Tensor, features: Tensor) -> Tensor:
    target = None if torch.is_grad_enabled() else place.take()  # a gradient of a gradient needs a graph
    return rows.t() @ features if target is None else torch.mm(rows.t(), features, out=target)
