"""Calls of a user's functions with the arguments that they name, and checks of the results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from paramserver.distribute.core.nest import described
from paramserver.errors import ConfigError

Batch = tuple[Any, Any]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_with_named(fn: Callable[..., Any], offered: Mapping[str, object]) -> Any:
    """Call ``fn`` with those of the offered arguments that it names.

    Raises:
        ConfigError: If it needs an argument that is not offered.
    """
    check_arguments(fn, offered)
    return fn(**{name: value for name, value in offered.items() if accepts(fn, name)})


def accepts(fn: Callable[..., Any], name: str) -> bool:
    """Return whether a function can be called with an argument of this name."""
    return any(
        parameter.kind is parameter.VAR_KEYWORD or (parameter.kind in _NAMED and parameter.name == name)
        for parameter in inspect.signature(fn).parameters.values()
    )


def check_arguments(fn: Callable[..., Any], offered: Collection[str]) -> None:
    """Check that a function needs no argument beyond the offered ones.

    Raises:
        ConfigError: If it does; the message names the argument.
    """
    for parameter in inspect.signature(fn).parameters.values():
        is_offered = parameter.kind in _NAMED and parameter.name in offered
        if parameter.default is parameter.empty and parameter.kind not in _COLLECTING and not is_offered:
            raise ConfigError(
                f"{name_of(fn)} asks for an argument {parameter.name!r}; it may ask for {', '.join(offered)} by name"
            )


def batches_of(data: object, where: str) -> Iterator[Batch]:
    """Yield the ``(features, labels)`` batches of an input_fn's result: a DataLoader, a Dataset or any iterable.

    A batch that is neither a tuple nor a list, such as a tensor or a dict, is features alone; its labels are None.
    So is a list of one element, which a DataLoader makes from a dataset of single tensors.

    >>> list(batches_of([("a", 1), {"x": "b"}, ["c"]], "input_fn"))
    [('a', 1), ({'x': 'b'}, None), ('c', None)]

    Raises:
        ConfigError: If the result has another type, or a batch is a tuple of more than ``(features, labels)``.
    """
    if isinstance(data, tuple) and any(isinstance(each, torch.Tensor) for each in data):
        raise ConfigError(
            f"{where}: expected batches that are pairs (features, labels), got a Tensor as the first batch: a tuple of "
            "tensors is one batch; return a list of such tuples"
        )
    for batch in _iterate(data, where):
        if not isinstance(batch, (tuple, list)):
            yield batch, None
        elif len(batch) in (1, 2):
            yield batch[0], batch[1] if len(batch) == 2 else None
        else:
            raise ConfigError(
                f"{where}: expected batches that are pairs (features, labels), or features alone, got "
                f"{described(batch)}; put several features into a dict"
            )


def features_of(data: object, where: str) -> Iterator[Any]:
    """Yield the batches of features of an input_fn for predictions; labels that come with them are left out.

    Raises:
        ConfigError: If the result is not an input, or a batch is a tuple of more than ``(features, labels)``.

    >>> list(features_of([([1, 2], "labels"), ([3],), {"x": 4}], "input_fn"))
    [[1, 2], [3], {'x': 4}]
    """
    for batch in _iterate(data, where):
        if not isinstance(batch, (tuple, list)):
            yield batch
        elif len(batch) in (1, 2):
            yield batch[0]
        else:
            raise ConfigError(
                f"{where}: expected batches of features, or pairs (features, labels), got {described(batch)}; "
                "put several features into a dict"
            )


class LossTypeError(ConfigError, TypeError):
    """A loss_fn returned something other than a tensor."""


def as_loss(value: object) -> torch.Tensor:
    """Return the result of a loss_fn after checking it.

    Raises:
        LossTypeError: If it is not a tensor.
        ConfigError: If it does not have exactly one element.
    """
    if not isinstance(value, torch.Tensor):
        raise LossTypeError(f"loss_fn must return a tensor of one element, got a {type(value).__name__}")
    if value.numel() != 1:
        raise ConfigError(
            f"loss_fn must return a tensor of one element, got a {type(value).__name__} of shape {list(value.shape)}; "
            "reduce it, for instance with mean()"
        )
    return value


def _iterate(data: object, where: str) -> Iterable[Any]:
    if isinstance(data, Dataset) and not hasattr(data, "__iter__"):
        return (data[index] for index in range(len(data)))  # type: ignore[arg-type]  # a map-style Dataset has a length
    if isinstance(data, Iterable):
        return data
    raise ConfigError(
        f"{where}: expected a DataLoader, a Dataset of batches or an iterable of batches, got {described(data)}"
    )


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a function for messages."""
    return getattr(fn, "__name__", None) or repr(fn)
