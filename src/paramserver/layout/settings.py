"""The mathematical settings of an optimizer's param group, as plain numbers that are sent with each push."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Mapping, Sequence

from torch import optim

from paramserver.errors import ConfigError

# They choose how to compute, not what: each machine decides for itself.
_NOT_MATHEMATICS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})

Setting = float | int | bool | None | tuple[float, ...]

_PLAIN = frozenset({float, int, bool, type(None)})


def setting_names(optimizer: type[optim.Optimizer]) -> tuple[str, ...]:
    """Return the constructor arguments of an optimizer class that are mathematical, in their order."""
    return tuple(name for name in inspect.signature(optimizer).parameters if name not in _NOT_MATHEMATICS)


def settings(group: Mapping[str, object], names: Iterable[str]) -> dict[str, Setting]:
    """Return the settings `names` of a param group as plain numbers. Called for every push.

    A schedule may change any of them between two steps. Takes about a microsecond.

    Raises:
        ConfigError: If a setting is not a number.

    Example:
        >>> import torch
        >>> settings({"lr": torch.tensor(0.5), "betas": [0.9, 0.99], "params": []}, ("lr", "betas"))
        {'lr': 0.5, 'betas': (0.9, 0.99)}
    """
    return {name: number(group[name]) for name in names}


class GroupSettings:
    """The `settings` of a param group for every push; computed again only when one of them has changed.

    Example:
        >>> group = {"lr": 0.5}
        >>> numbers = GroupSettings(group, ("lr",))
        >>> numbers.now() is numbers.now()
        True
        >>> group["lr"] = 0.25
        >>> numbers.now()
        {'lr': 0.25}
    """

    def __init__(self, group: Mapping[str, object], names: Sequence[str]) -> None:
        self._group = group
        self._names = names
        self._read = operator.itemgetter(*names, names[0])  # one name twice, so that the result is always a tuple
        self._seen: object = None
        self._now: dict[str, Setting] = {}

    def now(self) -> dict[str, Setting]:
        """Return the present settings; do not change the result.

        Raises:
            ConfigError: If a setting is not a number.
        """
        found = self._read(self._group)
        if found != self._seen:
            self._now = settings(self._group, self._names)
            # The content of a tensor may change while the tensor stays the same object.
            self._seen = found if all(map(_is_plain, found)) else None
        return self._now


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value)))


def fault(name: str, value: Setting, declared: Setting, least_lr: float = 0.0) -> str:
    """Return the reason why a setting that has come from a peer cannot be meant; empty if there is none.

    Args:
        name: The name of the setting.
        value: Its value.
        declared: Its value when the rule was declared, which an optimizer of this kind has accepted.
        least_lr: The least learning rate. torch.optim takes none below 0.

    >>> fault("lr", float("nan"), 0.1), fault("betas", 0.9, (0.9, 0.99)), fault("lr", 0.2, 0.1)
    ('lr=nan is not a number', 'betas=0.9: expected a tuple of 2 numbers', '')
    """
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    if any(map(math.isnan, numbers)):
        return f"{name}={value} is not a number"
    if name == "lr" and not (len(numbers) == 1 and least_lr <= numbers[0] < math.inf):
        return f"lr={value}: expected a finite number{', 0 or more' if least_lr == 0.0 else ''}"
    if isinstance(declared, tuple) and not (isinstance(value, tuple) and len(value) == len(declared)):
        return f"{name}={value}: expected a tuple of {len(declared)} numbers"
    if isinstance(declared, (int, float)) and not isinstance(value, (int, float)):
        return f"{name}={value}: expected a number"
    return ""


def number(value: object) -> Setting:
    """Return a setting as a plain number, also from a tensor or a numpy scalar; a sequence becomes a tuple."""
    if type(value) in _PLAIN:
        return value  # type: ignore[return-value]  # narrowed by its exact type: a numpy float is a float too
    if isinstance(value, (tuple, list)):
        return tuple(map(float, value))
    try:
        return float(value)  # type: ignore[arg-type]  # refused below where it has no __float__
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"an optimizer's setting must be a number or a tuple of numbers, got {value!r}") from error
