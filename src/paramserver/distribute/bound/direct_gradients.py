"""Large linear layers whose weight gradient is computed in the memory that is pushed.

Autograd makes every gradient in new memory, from which it has to be copied to its place. For a large weight, that means
a second gradient for a moment, and pages that the kernel has to clear. Here the backward of ``nn.Linear`` writes to the
place itself and hands an alias of it to autograd; everything that autograd does with gradients (hooks, accumulation,
``autograd.grad``, double backward) works as usual.

Rules
    * The place is written only while the parameter has no gradient and nothing refers to a gradient that was put
      there; otherwise the backward makes its gradient in new memory, as torch does.
    * Under autocast, ``torch.compile``, tracing, scripting and torch.func transforms the layer is torch's own.
    * A module that is pickled or copied becomes a plain ``nn.Linear``.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramserver.distribute.bound.gradient_place import GradientPlace
from paramserver.memory.torch_internals import is_batched, is_scripting, is_tracing, is_transformed

LARGE = 1 << 20
"""Smallest size of a weight in bytes: below it, the copy is cheaper than a Python function in the backward."""


def make_direct(model: nn.Module, places: dict[int, GradientPlace]) -> None:
    """Have every large ``nn.Linear`` of a model compute its weight gradient in its place.

    Args:
        model: The model. Modules whose class is exactly ``nn.Linear`` are changed.
        places: The gradient places by the id of their parameter.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            place = places.get(id(module.weight))
            if place is not None and place.view.nbytes >= LARGE:
                vars(module)["_gradient_place"] = place
                module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def forward(self: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002  # the name that nn.Linear gives it
    """Compute ``nn.Linear.forward``.

    TorchScript compiles only the first branch. A pickle refers to this function as ``module.forward``, so it loads as
    the method of the class.
    """
    if is_scripting():
        return F.linear(input, self.weight, self.bias)
    return _linear(self, input)


def _linear(module: nn.Linear, features: Tensor) -> Tensor:
    place: GradientPlace | None = vars(module)["_gradient_place"]
    if place is None or module.weight is not place.parameter or not torch.is_grad_enabled() or _is_special():
        return F.linear(features, module.weight, module.bias)
    output: Tensor = _DirectLinear.apply(features, module.weight, module.bias, place)  # type: ignore[no-untyped-call]
    return output


def _is_special() -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch.compiler.is_compiling()
        or is_tracing()
        or is_transformed()
    )


class _DirectLinear(torch.autograd.Function):
    """``F.linear`` with a place for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, place: GradientPlace) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.save_for_forward(features, weight)
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

    @staticmethod
    def jvp(ctx: Any, features: Tensor | None, weight: Tensor | None, bias: Tensor | None, _: None) -> Tensor:
        """Compute the output's tangent from the inputs' tangents."""
        held_features, held_weight = ctx.saved_tensors
        terms = []
        if features is not None:
            terms.append(F.linear(features, held_weight))
        if weight is not None:
            terms.append(F.linear(held_features, weight))
        if bias is not None:
            terms.append(bias.expand(*held_features.shape[:-1], -1))
        return sum(terms[1:], start=terms[0])


def _weight_gradient(place: GradientPlace, rows: Tensor, features: Tensor) -> Tensor:
    is_plain = torch.is_grad_enabled() or is_transformed() or is_batched(rows)  # double backward needs a graph
    target = None if is_plain else place.take_for_backward()
    return rows.t() @ features if target is None else torch.mm(rows.t(), features, out=target)
