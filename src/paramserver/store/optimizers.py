"""torch.optim's optimizers as the store makes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import torch
from torch import nn, optim

from paramserver.errors import ConfigError
from paramserver.rules import ROW_RULES, RULES, Setting


def build(
    optimizer: type[optim.Optimizer], settings: Mapping[str, Setting], parameter: nn.Parameter
) -> optim.Optimizer:
    """An optimizer over one parameter, with the fastest exact way to compute that there is.

    Raises:
        ConfigError: A value that torch.optim refuses.
    """
    options: dict[str, bool] = {"foreach": False} if "foreach" in inspect.signature(optimizer).parameters else {}
    if parameter.dtype in (torch.float32, torch.float64) and _fused_pays(optimizer, settings):
        options["fused"] = True
    try:
        return _light(optimizer.__name__)([parameter], **settings, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"torch.optim.{optimizer.__name__} refuses {dict(settings)}: {error}") from error


def _fused_pays(optimizer: type[optim.Optimizer], settings: Mapping[str, Setting]) -> bool:
    """Whether torch has a fused CPU kernel for this and it is faster than the passes it replaces.

    It is 2 to 10 times faster where there are several passes; plain SGD is one pass already and loses by it.
    """
    if optimizer is optim.SGD:
        return bool(settings.get("momentum") or settings.get("weight_decay"))
    return optimizer in (optim.Adam, optim.AdamW, optim.Adagrad)


@functools.cache
def _light(name: str) -> Callable[..., optim.Optimizer]:
    """The class of a rule, without the guard around `add_param_group`.

    The guard keeps torch.compile away and, for that, imports the whole compiler when the first optimizer is
    made: a second and 70 MB that a ps has no use for.
    """
    optimizer = RULES.get(name) or ROW_RULES[name]
    unguarded = {"add_param_group": inspect.unwrap(optimizer.add_param_group)}
    return type(optimizer.__name__, (optimizer,), unguarded)
