"""A model that starts with values of another one.

Rules
    * Variables that ``vars_to_warm_start`` chooses take the values; all others stay as the model_fn made them.
    * A single expression chooses among the parameters, trained or frozen; a list chooses among parameters and buffers
      (BatchNorm's running statistics), as in tf.estimator.
    * An expression is matched from the beginning of a name; an expression that is a variable's whole name means only
      that variable.
    * Each name of a tied weight stands for the weight. Optimizers start anew: slots are not taken over.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import nn

from paramserver.checkpoint.saved_values import SavedValues
from paramserver.distribute.bound.plan import named_parameters, persistent_buffers, plain_name
from paramserver.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStartSettings:
    """The source of a model's first values, and the choice among them.

    >>> WarmStartSettings("run/ckpt-100", vars_to_warm_start="encoder").expressions
    ('encoder',)

    Raises:
        ConfigError: If the path is empty, or a field has an invalid type.
    """

    ckpt_to_initialize_from: str
    """The path or URL of a checkpoint, of a model_dir (its latest checkpoint), of an exported model's folder, or of a
    safetensors file."""
    _: KW_ONLY
    vars_to_warm_start: str | Sequence[str] = ".*"
    """A regular expression for names of parameters; or a list of expressions or names, of parameters and buffers."""
    var_name_to_prev_var_name: Mapping[str, str] = field(default_factory=dict)
    """The names in the checkpoint of variables that have another name there."""

    def __post_init__(self) -> None:
        path = self.ckpt_to_initialize_from
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigError(f"WarmStartSettings: ckpt_to_initialize_from: expected a path, got {path!r}")
        object.__setattr__(self, "ckpt_to_initialize_from", str(path))
        renamed = self.var_name_to_prev_var_name
        object.__setattr__(self, "var_name_to_prev_var_name", _checked_names(renamed))
        if not isinstance(self.vars_to_warm_start, (str, list, tuple)):
            raise _no_expression(self.vars_to_warm_start)
        for expression in self.expressions:
            _check_expression(expression)

    @property
    def expressions(self) -> tuple[str, ...]:
        """The expressions that choose variables, one or several."""
        chosen = self.vars_to_warm_start
        return (chosen,) if isinstance(chosen, str) else tuple(chosen)


def as_settings(warm_start_from: object) -> WarmStartSettings | None:
    """Return the ``warm_start_from`` of an Estimator as settings.

    Raises:
        ConfigError: If it is neither a path nor settings.
    """
    if warm_start_from is None or isinstance(warm_start_from, WarmStartSettings):
        return warm_start_from
    if isinstance(warm_start_from, (str, os.PathLike)):
        return WarmStartSettings(str(warm_start_from))
    raise ConfigError(
        f"Estimator: warm_start_from: expected a path or WarmStartSettings, got a {type(warm_start_from).__name__}"
    )


def warm_start(model: nn.Module, settings: WarmStartSettings) -> None:
    """Give a model its first values, in place, converted to its dtypes. Blocks while they are read.

    Raises:
        ConfigError: If an expression chooses nothing, or a renamed variable is not chosen.
        CheckpointError: If a value is missing, or has another shape than the variable.
    """
    source = SavedValues.at(settings.ckpt_to_initialize_from)
    wanted: dict[str, list[_Target]] = {}
    for target in _chosen(model, settings):
        wanted.setdefault(_saved_as(target, source, settings), []).append(target)
    for stored in source.stored(wanted):
        for target in wanted[stored.name]:
            target.check(stored.name, stored.shape, settings.ckpt_to_initialize_from)
            target.fill(stored.read())
    count = sum(map(len, wanted.values()))
    logger.info("%d variables begin with values of %s", count, settings.ckpt_to_initialize_from)


@dataclass(frozen=True)
class _Target:
    """A variable of the model.

    Attributes:
        names: Its name, and further names if it is tied.
        tensor: The parameter or buffer.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor

    def check(self, saved_as: str, shape: tuple[int, ...], path: str) -> None:
        if tuple(self.tensor.shape) != shape:
            raise CheckpointError(
                f"warm start of {self.names[0]!r} from {path}: expected a value of shape {list(self.tensor.shape)}, "
                f"got {list(shape)} of {saved_as!r}; leave it out with vars_to_warm_start, or make the model alike",
                path,
            )

    def fill(self, value: torch.Tensor) -> None:
        self.tensor.detach().copy_(value)


def _chosen(model: nn.Module, settings: WarmStartSettings) -> list[_Target]:
    targets = _targets(model, with_buffers=not isinstance(settings.vars_to_warm_start, str))
    known = {name for target in targets for name in target.names}
    matched = {expression: _matching(expression, known) for expression in settings.expressions}
    for expression, names in matched.items():
        if not names:
            raise ConfigError(
                f"warm start: {expression!r} of vars_to_warm_start is not the name of a variable, and matches the "
                f"beginning of none; the variables are {_some(known)}"
            )
    chosen: set[str] = set().union(*matched.values())
    found = [target for target in targets if not chosen.isdisjoint(target.names)]
    unused = settings.var_name_to_prev_var_name.keys() - {name for target in found for name in target.names}
    if unused:
        raise ConfigError(
            f"warm start: var_name_to_prev_var_name has {sorted(unused)}, which vars_to_warm_start does not choose; "
            f"it chooses from {_some(known)}"
        )
    return found


def _targets(model: nn.Module, *, with_buffers: bool) -> list[_Target]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in _named(model, with_buffers):
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(name)
    return [_Target(tuple(names[key]), tensor) for key, tensor in tensors.items()]


def _named(model: nn.Module, with_buffers: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from named_parameters(model)
    if with_buffers:
        yield from ((name, buffer) for name, buffer, _ in persistent_buffers(model))


def _matching(expression: str, names: set[str]) -> set[str]:
    return {expression} if expression in names else {name for name in names if re.match(expression, name)}


def _saved_as(target: _Target, source: SavedValues, settings: WarmStartSettings) -> str:
    """Return the name of the saved variable whose value a variable takes."""
    known = {plain_name(name): name for name in source.names} | {name: name for name in source.names}
    renamed = settings.var_name_to_prev_var_name
    before = [renamed[name] for name in target.names if name in renamed] or list(target.names)
    for name in before:
        if name in known:
            return source.variable(known[name])
    raise CheckpointError(
        f"warm start of {target.names[0]!r} from {settings.ckpt_to_initialize_from}: it holds no value {before[0]!r}, "
        f"only {_some(set(source.names))}; leave the variable out with vars_to_warm_start, or name the value with "
        "var_name_to_prev_var_name",
        settings.ckpt_to_initialize_from,
    )


def _some(names: set[str], limit: int = 8) -> str:
    shown = ", ".join(map(repr, sorted(names)[:limit]))
    return f"{shown} and {len(names) - limit} others" if len(names) > limit else shown or "none"


def _checked_names(renamed: object) -> dict[str, str]:
    if renamed is None:
        return {}
    if isinstance(renamed, Mapping) and all(isinstance(name, str) for pair in renamed.items() for name in pair):
        return dict(renamed)
    raise ConfigError(
        f"WarmStartSettings: var_name_to_prev_var_name: expected a dict of names to names, got {renamed!r}"
    )


def _check_expression(expression: object) -> None:
    if not isinstance(expression, str):
        raise _no_expression(expression)
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"WarmStartSettings: vars_to_warm_start: {expression!r} is not a regular expression: {error}"
        ) from error


def _no_expression(got: object) -> ConfigError:
    return ConfigError(
        "WarmStartSettings: vars_to_warm_start: expected a regular expression, or a list of expressions and names, "
        f"got {got!r}"
    )
