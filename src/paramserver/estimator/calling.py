"""Calling a user's functions with the arguments that they name, and making sense of what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset

from paramserver.errors import ConfigError

Batch = tuple[Any, Any]


def call_with_named(fn: Callable[..., Any], offered: Mapping[str, object]) -> Any:  # noqa: ANN401  # the user's own
    """Call ``fn`` with those of the offered arguments that it names.

    Raises:
        ConfigError: If it needs an argument that is not offered.
    """
    parameters = inspect.signature(fn).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    _check_known(fn, parameters.values(), offered)
    return fn(**{name: value for name, value in offered.items() if takes_any or name in parameters})


def batches_of(data: object, where: str) -> Iterator[Batch]:
    """The ``(features, labels)`` batches of what an input_fn returned: a DataLoader, a Dataset, any iterable.

    Raises:
        ConfigError: If it is none of these, or a batch is no pair.
    """
    for batch in _iterate(data, where):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ConfigError(f"{where}: expected batches that are pairs (features, labels), got {_shown(batch)}")
        yield batch[0], batch[1]


def _iterate(data: object, where: str) -> Iterable[Any]:
    if isinstance(data, Dataset) and not hasattr(data, "__iter__"):
        return (data[index] for index in range(len(data)))  # type: ignore[arg-type]  # a map-style Dataset has a length
    if isinstance(data, Iterable):
        return data
    raise ConfigError(
        f"{where}: expected a DataLoader, a Dataset of batches or an iterable of batches, got {_shown(data)}"
    )


def _check_known(fn: Callable[..., Any], parameters: Iterable[inspect.Parameter], offered: Mapping[str, object]) -> None:
    for parameter in parameters:
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if needed and parameter.name not in offered:
            name = getattr(fn, "__name__", repr(fn))
            raise ConfigError(
                f"{name} asks for an argument {parameter.name!r}; it may ask for {', '.join(offered)} by name"
            )


def _shown(value: object) -> str:
    length = f" of length {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{length}"
