"""Update rules: which optimizers a parameter server can run, and how one travels to it.

A rule is one of torch.optim's own optimizers; the formulas stand in its documentation
(https://docs.pytorch.org/docs/stable/optim.html). It travels as a name and the numbers of one param group,
never as code, so a peer can choose among `RULES` and nothing else. To add a rule, which must be elementwise,
add its class to `RULES` and a row to the table in tests/unit/layout/test_rules.py.

`ROW_RULES` are those that torch.optim runs with sparse gradients: they change the rows that have one, and no other.
"""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from torch import optim

from paramserver.errors import ConfigError, UnsupportedOptimizerError

RULES: dict[str, type[optim.Optimizer]] = {
    "SGD": optim.SGD,
    "Adagrad": optim.Adagrad,
    "Adam": optim.Adam,
    "AdamW": optim.AdamW,
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": optim.RMSprop,
    "Rprop": optim.Rprop,
    "ASGD": optim.ASGD,
    "Adadelta": optim.Adadelta,
}

ROW_RULES: dict[str, type[optim.Optimizer]] = {
    "SGD": optim.SGD,
    "Adagrad": optim.Adagrad,
    "SparseAdam": optim.SparseAdam,
}

_ALL_RULES = RULES | ROW_RULES

# By name: not every supported version of torch has all of them.
_REFUSED = {
    "LBFGS": "its line search moves all parameters at once and evaluates the loss several times in a step",
    "Muon": "it orthogonalises whole matrices, and a ps updates elements without knowing their matrix",
    "Adafactor": "its state is row and column factors of whole matrices, and a ps updates elements",
    "SparseAdam": "it takes sparse gradients only, so it can hold weights of nn.Embedding(sparse=True) and no others",
}

SLOT_SETTINGS: dict[str, dict[str, str]] = {
    "Adam": {"amsgrad": "max_exp_avg_sq"},
    "AdamW": {"amsgrad": "max_exp_avg_sq"},
    "RMSprop": {"momentum": "momentum_buffer", "centered": "grad_avg"},
}
"""Settings that need a slot, which torch.optim makes in an element's first update or never."""

# How an optimizer computes, not what: each machine decides these for itself.
_NOT_MATHEMATICS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})

Setting = float | int | bool | None | tuple[float, ...]

_PLAIN = frozenset({float, int, bool, type(None)})


class Rule(msgspec.Struct, frozen=True):
    """An update rule as it travels: a key of `RULES` and the numbers of one param group.

    Example:
        >>> import torch
        >>> describe(torch.optim.SGD([torch.zeros(3)], lr=0.1, momentum=0.9), 0).settings["momentum"]
        0.9
    """

    name: str
    settings: dict[str, Setting]


def describe(optimizer: optim.Optimizer, group: int) -> Rule:
    """Describes param group number `group` of `optimizer` as a rule that can travel.

    Raises:
        UnsupportedOptimizerError: The optimizer is not elementwise, is a subclass, or is unknown.
        ConfigError: A setting is no number.
    """
    if RULES.get(type(optimizer).__name__) is not type(optimizer):
        raise _refusal(type(optimizer))
    return _described(optimizer, group)


def describe_row_rule(optimizer: optim.Optimizer, group: int, table: str) -> Rule:
    """Describes a param group as the rule of a table, whose gradients are sparse.

    Raises:
        UnsupportedOptimizerError: torch.optim does not run it with sparse gradients, or would change other rows.
        ConfigError: A setting is no number.
    """
    name = type(optimizer).__name__
    if ROW_RULES.get(name) is not type(optimizer):
        raise UnsupportedOptimizerError(
            f"{name} cannot update {table!r}, whose gradient is sparse (nn.Embedding with sparse=True): that can "
            f"{', '.join(ROW_RULES)}; give it to an optimizer of these, or make it sparse=False",
            name,
        )
    rule = _described(optimizer, group)
    if fault := row_fault(rule.settings):
        raise UnsupportedOptimizerError(
            f"{name} cannot update {table!r}, whose gradient is sparse: {fault}; give it a param group without, "
            "or make it sparse=False",
            name,
        )
    return rule


def row_fault(numbers: Mapping[str, Setting]) -> str:
    """What of a rule's settings would change rows that have no gradient; empty if nothing.

    >>> row_fault({"lr": 0.1, "momentum": 0.9})
    'momentum=0.9 would move rows that have no gradient'
    """
    return next(
        (
            f"{name}={numbers[name]} would move rows that have no gradient"
            for name in ("momentum", "weight_decay")
            if numbers.get(name)
        ),
        "",
    )


def _described(optimizer: optim.Optimizer, group: int) -> Rule:
    name = type(optimizer).__name__
    param_group = optimizer.param_groups[group]
    if param_group.get("differentiable"):
        raise UnsupportedOptimizerError(
            f"{name}(differentiable=True) cannot run on a parameter server: no autograd graph leads through "
            "an update on another machine; leave differentiable=False",
            name,
        )
    numbers = settings(param_group, setting_names(type(optimizer)))
    if "initial_accumulator_value" in numbers:
        # torch.optim.Adagrad reads the defaults for this one, whatever the group says.
        numbers["initial_accumulator_value"] = _number(optimizer.defaults["initial_accumulator_value"])
    return Rule(name, numbers)


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
    return {name: _number(group[name]) for name in names}


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


def setting_names(optimizer: type[optim.Optimizer]) -> tuple[str, ...]:
    """The constructor arguments of an optimizer class that are mathematics, in their order."""
    return tuple(name for name in inspect.signature(optimizer).parameters if name not in _NOT_MATHEMATICS)


def rule_class(rule: Rule) -> type[optim.Optimizer]:
    """The torch.optim class of a rule that came from a peer, after checking its name and setting names.

    Raises:
        UnsupportedOptimizerError: The name is in neither `RULES` nor `ROW_RULES`.
        ConfigError: A setting is none of this rule's.
    """
    if rule.name not in _ALL_RULES:
        raise UnsupportedOptimizerError(
            f"no update rule is called {rule.name!r}; {_known(rule.name, _ALL_RULES)}", rule.name
        )
    names = setting_names(_ALL_RULES[rule.name])
    for name in rule.settings:
        if name not in names:
            raise ConfigError(f"update rule {rule.name} has no setting {name!r}; {_known(name, names)}")
    return _ALL_RULES[rule.name]


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value)))


def _number(value: object) -> Setting:
    """A setting as a plain number: out of a tensor or a numpy scalar, a sequence as a tuple."""
    if type(value) in _PLAIN:
        return value  # type: ignore[return-value]  # narrowed by its exact type: a numpy float is a float too
    if isinstance(value, (tuple, list)):
        return tuple(map(float, value))
    try:
        return float(value)  # type: ignore[arg-type]  # refused below where it has no __float__
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"an optimizer's setting must be a number or a tuple of them, got {value!r}") from error


def _refusal(optimizer: type[optim.Optimizer]) -> UnsupportedOptimizerError:
    """Why this class, which is none of `RULES`, cannot run on a ps."""
    name = optimizer.__name__
    for base in optimizer.__mro__:
        if base.__module__.startswith("torch.optim") and base.__name__ in _REFUSED:
            why = _REFUSED[base.__name__]
            break
        if base in RULES.values():
            why = (
                f"it is a subclass of torch.optim.{base.__name__} whose step() may differ, and a ps runs "
                f"torch.optim's own; use {base.__name__} itself"
            )
            break
    else:
        why = f"it is not known to be elementwise; {_known(name, RULES)}"
    return UnsupportedOptimizerError(f"{name} cannot run on a parameter server: {why}", name)


def _known(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known ones and the nearest."""
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    suggestion = f"; did you mean {by_lower[near[0]]!r}?" if near else ""
    return f"known are {', '.join(by_lower.values())}{suggestion}"
