"""An update rule of another package: the sign of the momentum (Bernstein et al., signSGD, 2018, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class Signum(torch.optim.Optimizer):
    """Move each element by ``lr`` against the sign of the mean of its gradients, which ``momentum`` discounts."""

    def __init__(self, params: list[nn.Parameter], lr: float = 0.01, discount: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "discount": discount})

    @staticmethod
    def row_slots(settings: Mapping[str, Any]) -> dict[str, float]:
        """Each row has a mean of its gradients, zero at first."""
        return {"mean": 0.0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if "mean" not in state:
                        state["mean"] = torch.zeros_like(parameter)
                    state["mean"].lerp_(parameter.grad, 1 - group["discount"])
                    parameter.sub_(state["mean"].sign(), alpha=group["lr"])
