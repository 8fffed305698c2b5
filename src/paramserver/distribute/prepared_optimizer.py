"""The optimizer that `Strategy.prepare` gives back: its step pushes gradients and pulls values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from paramserver.client import PushResult
from paramserver.errors import ConfigError


class PreparedOptimizer(torch.optim.Optimizer):
    """Stands for the user's optimizer; the rule itself runs on the parameter servers.

    It shares the param groups of the optimizer that it was made from, so learning-rate schedulers work whether they
    were given that one or this one. Optimizer state lives on the parameter servers; ``state`` is empty here.

    Attributes:
        last_push: What came of the last `step`: the global step and the staleness; None before the first.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, push: Callable[[], PushResult]) -> None:
        # The groups, defaults and registered hooks are the user's optimizer's own, so its constructor is not run.
        self.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
        self.state = defaultdict(dict)
        self.last_push: PushResult | None = None
        self._original = optimizer
        self._push = push

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Push the gradients to the parameter servers, which apply them, and pull fresh values. Blocks.

        Args:
            closure: Computes the loss and the gradients first, if it is given.

        Returns:
            What the closure returned.

        Raises:
            UnavailableError: If a ps is lost; the message names it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for before in self._optimizer_step_pre_hooks.values():
            before(self, (), {})
        with torch.no_grad():
            self.last_push = self._push()
        self._original._opt_called = True  # type: ignore[attr-defined]  # schedulers look whether a step was taken
        for after in self._optimizer_step_post_hooks.values():
            after(self, (), {})
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; see ``torch.optim.Optimizer.zero_grad``."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the variables of a run are fixed when it starts."""
        raise ConfigError(
            "add_param_group: a prepared optimizer cannot take more parameters; "
            "give them to the optimizer before prepare, with requires_grad=False if they are to be trained later"
        )
