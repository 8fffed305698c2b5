"""The optimizer that `Strategy.prepare` gives back: its step pushes gradients and pulls values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from paramserver.client import PushResult
from paramserver.errors import ConfigError


class PreparedOptimizer(torch.optim.Optimizer):
    """Stands for the user's optimizer; the rule itself runs on the parameter servers.

    It shares the param groups and the hooks of the optimizer that it was made from, so learning-rate schedulers and
    hooks work whether they were given that one or this one. Optimizer state lives on the parameter servers and is
    saved by their checkpoints: ``state`` is empty here, and ``state_dict()`` holds the param groups only.

    Args:
        optimizer: The user's optimizer; not changed.
        push: Pushes gradients and pulls values.

    Attributes:
        last_push: What came of the last `step`: the global step and the staleness; None before the first.

    Raises:
        ConfigError: If the optimizer has state already, which would be lost.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, push: Callable[[], PushResult]) -> None:
        # The groups, defaults and registered hooks are the user's optimizer's own, so its constructor is not run.
        self.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
        self.state = defaultdict(dict)
        self.last_push: PushResult | None = None
        self._original = optimizer
        self._push = push

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients to the parameter servers, which apply them, and pull fresh values. Blocks.

        Args:
            closure: Computes the loss and the gradients first, if it is given.

        Returns:
            What the closure returned.

        Raises:
            UnavailableError: If a ps is lost; the message names it.
        """
        if self._has_step_hooks():
            return _step_with_hooks(self, closure)
        return self._step(closure)

    # torch would otherwise wrap the method for hooks and the profiler, which costs more than a small update.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; see ``torch.optim.Optimizer.zero_grad``."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the param groups' settings, such as learning rates, from what ``state_dict()`` returned.

        Raises:
            ConfigError: If it holds optimizer state, which lives on the parameter servers.
            ValueError: If its groups are others.
        """
        if state_dict["state"]:
            raise ConfigError(
                "load_state_dict: the state of a prepared optimizer lives on the parameter servers and is restored "
                f"from their checkpoints; got state of {len(state_dict['state'])} parameters"
            )
        groups = self.param_groups
        super().load_state_dict(state_dict)
        # The groups themselves are shared with schedulers and with what is pushed: they must stay the same objects.
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.update(loaded)
        self.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the variables of a run are fixed when it starts."""
        raise ConfigError(
            "add_param_group: a prepared optimizer cannot take more parameters; "
            "give them to the optimizer before prepare, with requires_grad=False if they are to be trained later"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a prepared optimizer cannot be copied or pickled: its state lives on the parameter servers")

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_push = self._push()
        self._original._opt_called = True  # type: ignore[attr-defined]  # schedulers look whether a step was taken
        return loss

    def _has_step_hooks(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(PreparedOptimizer._step)


def check_fresh(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that has made steps: its state cannot be brought to the parameter servers.

    Raises:
        ConfigError: If it has.
    """
    # Some rules make their state, at step 0, when they are constructed.
    used = [state for state in optimizer.state.values() if state and float(state.get("step", 1))]
    if used:
        raise ConfigError(
            f"prepare: the optimizer holds state of {len(used)} parameters (it has made steps, or loaded some), which "
            "would be lost: the parameter servers start afresh; construct a new optimizer for prepare"
        )
