"""Update rules: the ways in which a parameter server can apply a gradient, and the form in which a rule travels to it.

Rules
    * A rule is an optimizer class: one of torch.optim's, whose documentation states the formulas
      (https://docs.pytorch.org/docs/stable/optim.html), or one of an installed package's.
    * A rule travels as its name and the numbers of one param group, never as code: a peer can choose among the rules
      that the ps has, and nothing else.
    * A rule of another package is found by the entry point `GROUP`: the name of the entry is the name of the class, its
      value names the class. See `UpdateRule.of` for the attributes that the class may have. The package has to be
      installed on the workers and on the ps tasks.

To add a built-in rule, add a row to `RULES` and one to the table in tests/unit/layout/test_rules.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

import msgspec
from torch import optim

from paramserver.errors import ConfigError, UnsupportedOptimizerError, did_you_mean
from paramserver.layout.settings import Setting, number, setting_names, settings

GROUP = "paramserver.rules"

RowSlots = Callable[[Mapping[str, Setting]], Mapping[str, float]]
"""Function from a rule's settings to the slots of each row of a table, with the number that each slot begins with."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """An update rule in its dense form and, for the rows of tables, in its row form.

    The dense form is the optimizer's own ``step`` over flat slices of parameters, so it has to be elementwise. The row
    form is the same step over the rows that have a gradient, gathered with their slots.

    Attributes:
        optimizer: The class that programs use.
        row_slots: The slots of the row form; None if there is no row form.
        is_dense: Whether there is a dense form.
        takes_sparse: Whether the step takes sparse gradients only.
        slot_settings: Slots by the settings that need them, for slots that an element gets in its first update or
            never.
        package: The distribution that contains the rule; empty for a built-in one.
    """

    optimizer: type[optim.Optimizer]
    row_slots: RowSlots | None = None
    is_dense: bool = True
    takes_sparse: bool = False
    slot_settings: Mapping[str, str] = field(default_factory=dict)
    package: str = ""

    @functools.cached_property
    def setting_names(self) -> tuple[str, ...]:
        """The names of its settings, in the order of the constructor."""
        return setting_names(self.optimizer)

    @classmethod
    def of(cls, optimizer: object, package: str) -> UpdateRule:
        """Return the update rule for an optimizer class of a package.

        The ``step`` of the class must be elementwise, with state of 0-dimensional tensors and tensors of the
        parameter's shape. For tables, the class has a static method ``row_slots``, of type `RowSlots`. It may have a
        dict ``slot_settings``, as described above.

        Raises:
            ConfigError: If ``optimizer`` is not a subclass of ``torch.optim.Optimizer``.
        """
        if not (isinstance(optimizer, type) and issubclass(optimizer, optim.Optimizer)):
            raise ConfigError(
                f"the entry point {GROUP} of package {package!r} names {optimizer!r}; expected a subclass of "
                "torch.optim.Optimizer"
            )
        return cls(
            optimizer=optimizer,
            row_slots=getattr(optimizer, "row_slots", None),
            slot_settings=getattr(optimizer, "slot_settings", {}),
            package=package,
        )


_AMSGRAD = {"amsgrad": "max_exp_avg_sq"}

RULES: dict[str, UpdateRule] = {
    rule.optimizer.__name__: rule
    for rule in (
        UpdateRule(optimizer=optim.SGD, row_slots=lambda _: {}),
        UpdateRule(
            optimizer=optim.Adagrad,
            row_slots=lambda numbers: {"sum": float(numbers.get("initial_accumulator_value", 0.0))},  # type: ignore[arg-type]
        ),
        UpdateRule(optimizer=optim.Adam, slot_settings=_AMSGRAD),
        UpdateRule(optimizer=optim.AdamW, slot_settings=_AMSGRAD),
        UpdateRule(optimizer=optim.Adamax),
        UpdateRule(optimizer=optim.NAdam),
        UpdateRule(optimizer=optim.RAdam),
        UpdateRule(optimizer=optim.RMSprop, slot_settings={"momentum": "momentum_buffer", "centered": "grad_avg"}),
        UpdateRule(optimizer=optim.Rprop),
        UpdateRule(optimizer=optim.ASGD),
        UpdateRule(optimizer=optim.Adadelta),
        UpdateRule(
            optimizer=optim.SparseAdam,
            is_dense=False,
            takes_sparse=True,
            row_slots=lambda _: {"exp_avg": 0.0, "exp_avg_sq": 0.0},
        ),
    )
}

# By name, because not every supported version of torch has all of them.
_REFUSED = {
    "LBFGS": "its line search moves all parameters at once and evaluates the loss several times in a step",
    "Muon": "it orthogonalises whole matrices, and a ps updates elements without knowing their matrix",
    "Adafactor": "its state is row and column factors of whole matrices, and a ps updates elements",
    "SparseAdam": "it takes sparse gradients only, so it can hold weights of nn.Embedding(sparse=True) and no others",
}


class Rule(msgspec.Struct, frozen=True):
    """An update rule as it travels: its name, and the numbers of one param group.

    Example:
        >>> import torch
        >>> describe(torch.optim.SGD([torch.zeros(3)], lr=0.1, momentum=0.9), 0).settings["momentum"]
        0.9
    """

    name: str
    settings: dict[str, Setting]
    package: str = ""
    """The distribution that contains the rule; empty for a built-in one. Only for messages, not a part of the rule."""


def describe(optimizer: optim.Optimizer, group: int) -> Rule:
    """Describe param group number `group` of `optimizer` as a rule that can travel.

    Raises:
        UnsupportedOptimizerError: If the optimizer is not elementwise, is a subclass, or is unknown.
        ConfigError: If a setting is not a number.
    """
    rule = _rule_of(type(optimizer))
    if rule is None or not rule.is_dense:
        raise _refusal(type(optimizer))
    return _described(optimizer, group, rule)


def describe_row_rule(optimizer: optim.Optimizer, group: int, table: str) -> Rule:
    """Describe a param group as the rule of a table, whose gradients are sparse.

    Raises:
        UnsupportedOptimizerError: If the rule has no row form, or would change rows without a gradient.
        ConfigError: If a setting is not a number.
    """
    name, rule = type(optimizer).__name__, _rule_of(type(optimizer))
    if rule is None or rule.row_slots is None:
        with_rows = ", ".join(known for known, each in RULES.items() if each.row_slots)
        raise UnsupportedOptimizerError(
            f"{name} cannot update {table!r}, whose gradient is sparse (nn.Embedding with sparse=True): that can "
            f"{with_rows}; give it to an optimizer of these, or make it sparse=False",
            name,
        )
    described = _described(optimizer, group, rule)
    if fault := row_fault(described.settings):
        raise UnsupportedOptimizerError(
            f"{name} cannot update {table!r}, whose gradient is sparse: {fault}; give it a param group without, "
            "or make it sparse=False",
            name,
        )
    return described


def row_fault(numbers: Mapping[str, Setting]) -> str:
    """Return the description of a setting that would change rows without a gradient; empty without such a setting.

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


def find_rule(rule: Rule) -> UpdateRule:
    """Return the rule that a peer has described, after checking its name and the names of its settings.

    Raises:
        UnsupportedOptimizerError: If no rule of this name is built in or installed here.
        ConfigError: If the rule does not have one of the settings.
    """
    found = _found(rule.name)
    if found is None:
        there = [*RULES, *(point.name for point in entry_points(group=GROUP))]
        advice = f"; install the package {rule.package!r}, which brings it, on the ps tasks" if rule.package else ""
        raise UnsupportedOptimizerError(
            f"no update rule is called {rule.name!r} here{advice}; {_known(rule.name, there)}", rule.name
        )
    for name in rule.settings:
        if name not in found.setting_names:
            raise ConfigError(f"update rule {rule.name} has no setting {name!r}; {_known(name, found.setting_names)}")
    return found


def _rule_of(optimizer: type[optim.Optimizer]) -> UpdateRule | None:
    found = _found(optimizer.__name__)
    return found if found is not None and found.optimizer is optimizer else None


def _found(name: str) -> UpdateRule | None:
    if name in RULES:
        return RULES[name]
    point = next(iter(entry_points(group=GROUP, name=name)), None)
    return None if point is None else _installed(point)


@functools.cache
def _installed(point: EntryPoint) -> UpdateRule:
    return UpdateRule.of(point.load(), point.dist.name if point.dist else point.module.partition(".")[0])


def _described(optimizer: optim.Optimizer, group: int, rule: UpdateRule) -> Rule:
    name = type(optimizer).__name__
    param_group = optimizer.param_groups[group]
    if param_group.get("differentiable"):
        raise UnsupportedOptimizerError(
            f"{name}(differentiable=True) cannot run on a parameter server: no autograd graph leads through "
            "an update on another machine; leave differentiable=False",
            name,
        )
    numbers = settings(param_group, rule.setting_names)
    if "initial_accumulator_value" in numbers:
        # torch.optim.Adagrad itself reads this one from its defaults and ignores the group.
        numbers["initial_accumulator_value"] = number(optimizer.defaults["initial_accumulator_value"])
    return Rule(name, numbers, rule.package)


def _refusal(optimizer: type[optim.Optimizer]) -> UnsupportedOptimizerError:
    """Return the error for an optimizer class that is not in `RULES`, with the reason why a ps cannot run it."""
    name = optimizer.__name__
    for base in optimizer.__mro__:
        if base.__module__.startswith("torch.optim") and base.__name__ in _REFUSED:
            why = _REFUSED[base.__name__]
            break
        if any(base is rule.optimizer for rule in RULES.values()):
            why = (
                f"it is a subclass of torch.optim.{base.__name__} whose step() may differ, and a ps runs "
                f"torch.optim's own; use {base.__name__} itself"
            )
            break
    else:
        known = _known(name, RULES)
        why = f"it is not known to be elementwise; {known}; your own is found by the entry point {GROUP} of its package"
    return UnsupportedOptimizerError(f"{name} cannot run on a parameter server: {why}", name)


def _known(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known names, and the nearest one."""
    known = list(names)
    return f"known are {', '.join(known)}{did_you_mean(name, known)}"
