"""The settings of an optimizer's param group that are mathematics, as plain numbers that travel with each push."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence

from torch import optim

from paramserver.errors import ConfigError

# How an optimizer computes, not what: each machine decides these for itself.
_NOT_MATHEMATICS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})

Setting = float | int | bool | None | tuple[float, ...]

_PLAIN = frozenset({float, int, bool, type(None)})


def setting_names(optimizer: type[optim.Optimizer]) -> tuple[str, ...]:
    """The constructor arguments of an optimizer class that are mathematics, in their order."""
    return tuple(name for name in inspect.signature(optimizer).parameters if name not in _NOT_MATHEMATICS)


def settings(group: Mapping[str, object], names: Iterable[str]) -> dict[str, Setting]:
    """Reads the settings `names` out of a param group as plain numbers, for every push.

    A schedule may change any of them between two steps. Takes about a microsecond.

    Raises:
        ConfigError: A setting is no number.

    Example:
        >>> import torch
        >>> settings({"lr": torch.tensor(0.5), "betas": [0.9, 0.99], "params": []}, ("lr", "betas"))
        {'lr': 0.5, 'betas': (0.9, 0.99)}
    """
    return {name: number(group[name]) for name in names}


class GroupSettings:
    """The `settings` of a param group, read for every push: worked out anew when one of them has changed.

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
        self._read = operator.itemgetter(*names, names[0])  # twice, so that it is a tuple even of one
        self._seen: object = None
        self._now: dict[str, Setting] = {}

    def now(self) -> dict[str, Setting]:
        """What they are; not to be changed.

        Raises:
            ConfigError: A setting is no number.
        """
        found = self._read(self._group)
        if found != self._seen:
            self._now = settings(self._group, self._names)
            # A tensor may change without becoming another one.
            self._seen = found if all(map(_is_plain, found)) else None
        return self._now


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value)))


def number(value: object) -> Setting:
    """A setting as a plain number: out of a tensor or a numpy scalar, a sequence as a tuple."""
    if type(value) in _PLAIN:
        return value  # type: ignore[return-value]  # narrowed by its exact type: a numpy float is a float too
    if isinstance(value, (tuple, list)):
        return tuple(map(float, value))
    try:
        return float(value)  # type: ignore[arg-type]  # refused below where it has no __float__
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"an optimizer's setting must be a number or a tuple of them, got {value!r}") from error
