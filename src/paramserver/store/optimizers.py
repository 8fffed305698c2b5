"""The optimizers of update rules as the store makes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from paramserver.errors import ConfigError
from paramserver.layout.settings import Setting
from paramserver.memory import torch_internals

Kernel = Callable[[Sequence[nn.Parameter], Sequence[Tensor], Mapping[Tensor, Mapping[str, Tensor]]], bool]


def build(
    optimizer: type[optim.Optimizer], settings: Mapping[str, Setting], parameter: nn.Parameter
) -> optim.Optimizer:
    """Make an optimizer over one parameter that computes in the fastest exact way.

    Raises:
        ConfigError: If torch.optim refuses a value.
    """
    options: dict[str, bool] = {"foreach": False} if "foreach" in inspect.signature(optimizer).parameters else {}
    if parameter.dtype in (torch.float32, torch.float64) and _fused_pays(optimizer, settings):
        options["fused"] = True
    try:
        return _light(optimizer)([parameter], **settings, **options)  # type: ignore[arg-type]  # classes are hashable
    except (TypeError, ValueError) as error:
        raise ConfigError(f"torch.optim.{optimizer.__name__} refuses {dict(settings)}: {error}") from error


def _fused_pays(optimizer: type[optim.Optimizer], settings: Mapping[str, Setting]) -> bool:
    """Return whether torch has a fused CPU kernel for this optimizer that is faster than the passes it replaces.

    A fused kernel is 2 to 10 times faster than several passes; plain SGD is a single pass already and gets slower.
    """
    if optimizer is optim.SGD:
        return bool(settings.get("momentum") or settings.get("weight_decay"))
    return optimizer in (optim.Adam, optim.AdamW, optim.Adagrad)


@functools.cache
def _light(optimizer: type[optim.Optimizer]) -> Callable[..., optim.Optimizer]:
    """Return the class of a rule, without the guard around `add_param_group`.

    The guard disables torch.compile and, for that, imports the whole compiler when the first optimizer is made: one
    second and 70 MB that a ps does not need.
    """
    unguarded = {"add_param_group": inspect.unwrap(optimizer.add_param_group)}
    return type(optimizer.__name__, (optimizer,), unguarded)


def kernel(optimizer: type[optim.Optimizer], group: Mapping[str, Any]) -> Kernel | None:
    """Return the single operation that torch's step amounts to with the settings of a group; None if it is several.

    torch.optim takes 20 us until it calls the operation, or 100 us if other work has filled the caches: as long as a
    fused kernel takes for 100,000 elements.

    Returns:
        A function of parameters, their gradients, and the optimizer's state, which updates parameters and state. It
        returns whether it did: the first step of an optimizer with state is left to torch.

    Raises:
        TypeError: If the learning rate is not a number.
        ValueError: If there are not two betas.
    """
    if optimizer is optim.SGD and not any(map(group.get, ("momentum", "weight_decay", "maximize"))):
        return functools.partial(_descend, -group["lr"])
    if not group.get("fused"):
        return None
    if optimizer is optim.Adagrad:
        return _fused(torch_internals.fused_adagrad, ("sum",), group, "lr_decay")
    if optimizer in (optim.Adam, optim.AdamW):
        is_decoupled = optimizer is optim.AdamW or group.get("decoupled_weight_decay")
        beta1, beta2 = group["betas"]
        fused = torch_internals.fused_adamw if is_decoupled else torch_internals.fused_adam
        run = functools.partial(fused, beta1=beta1, beta2=beta2)
        largest = "max_exp_avg_sq" if group["amsgrad"] else ""
        return _fused(run, ("exp_avg", "exp_avg_sq", largest), group, "amsgrad")
    return None


def _descend(alpha: float, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], _: object) -> bool:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(gradient, alpha=alpha)
    return True


def _fused(run: Callable[..., None], slots: Sequence[str], group: Mapping[str, Any], *own: str) -> Kernel:
    settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", *own)}

    def step(
        parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Tensor]]
    ) -> bool:
        states = [known for parameter in parameters if (known := state.get(parameter))]
        if len(states) < len(parameters):
            return False
        lists = [[known[slot] for known in states if slot] for slot in (*slots, "step")]
        torch_internals.foreach_add(lists[-1], 1)
        run(parameters, gradients, *lists, **settings)
        return True

    return step
