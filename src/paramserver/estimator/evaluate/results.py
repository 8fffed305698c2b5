"""The results of an evaluation: for each metric a number, or a nest of numbers.

Rules
    * A nest is made of dicts, lists, tuples and arrays. A tensor of several numbers becomes a NumPy array, a tensor of
      a single number a float.
    * Each number of a nest has a name of its own, for summaries, early stopping and progress: the metric's, followed by
      the key or index, as in ``accuracy/0``, ``confusion/1/2`` or ``metrics/recall``.
    * A metric with more than `MAX_NUMBERS` numbers is not written: so many curves are of no use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from paramserver.distribute.core.nest import is_nest, map_leaves
from paramserver.errors import ConfigError

EvalResult = Mapping[str, Any]
"""The metrics of one evaluation, including ``loss`` and ``global_step``: numbers, or nests of numbers."""

MAX_NUMBERS = 1000
SHOWN_NUMBERS = 8


def as_result(name: str, value: Any) -> Any:
    """Convert a metric's result into plain numbers and arrays.

    >>> as_result("metrics", {"recall": torch.tensor(0.5), "of_class": torch.tensor([0.25, 0.75])})
    {'recall': 0.5, 'of_class': array([0.25, 0.75], dtype=float32)}

    Raises:
        ConfigError: If the result is neither a number nor a nest of numbers.
    """
    return map_leaves(lambda leaf: _plain(name, leaf), dict(value) if isinstance(value, Mapping) else value)


def scalars(results: EvalResult) -> dict[str, float]:
    """Return each number of the results under its own name.

    >>> scalars({"loss": 0.5, "accuracy": np.array([0.25, 0.75]), "metrics": {"recall": 1.0}})
    {'loss': 0.5, 'accuracy/0': 0.25, 'accuracy/1': 0.75, 'metrics/recall': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in results.items():
        if _count(value) <= MAX_NUMBERS:
            found.update(_named(name, value))
    return found


def unwritten(results: EvalResult) -> list[str]:
    """Return the names of the metrics with too many numbers to be written."""
    return [name for name, value in results.items() if _count(value) > MAX_NUMBERS]


def shown(value: Any) -> str:
    """Return a result as text: a number, or the first numbers of a nest.

    >>> shown(0.25), shown({"recall": 0.5, "precision": 1.0})
    ('0.25', '[0.5, 1]')
    """
    if not _is_divided(value):
        return f"{value:.6g}"
    numbers = [f"{number:.6g}" for _, number in _named("", value)]
    return f"[{', '.join(numbers[:SHOWN_NUMBERS])}{', ...' if len(numbers) > SHOWN_NUMBERS else ''}]"


def rebuilt(like: EvalResult, written: Mapping[str, float]) -> dict[str, Any] | None:
    """Arrange written numbers in the structure of other results; return None if a number is missing.

    The numbers of metrics that have too many to be written are NaN.

    >>> rebuilt({"loss": 0.5, "accuracy": np.zeros(2)}, {"loss": 2.0, "accuracy/0": 0.25, "accuracy/1": 0.75})
    {'loss': 2.0, 'accuracy': array([0.25, 0.75])}
    >>> rebuilt({"accuracy": np.zeros(2)}, {"accuracy/0": 0.25})
    """
    if not scalars(like).keys() <= written.keys():
        return None
    return {name: _filled(name, value, written) for name, value in like.items()}


class Watched(dict[str, Any]):
    """Results that record whether a number that was read by its name is NaN."""

    def __init__(self, results: EvalResult) -> None:
        super().__init__(
            {name: Watched(value) if isinstance(value, dict) else value for name, value in results.items()}
        )
        self._has_given_nan = False

    @property
    def has_given_nan(self) -> bool:
        """Whether a number that was read is NaN."""
        inner = (value for value in self.values() if isinstance(value, Watched))
        return self._has_given_nan or any(value.has_given_nan for value in inner)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self._has_given_nan |= isinstance(value, float) and math.isnan(value)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value or a default, like ``dict.get``; the read is recorded."""
        return self[name] if name in self else default  # noqa: SIM401  # `get` is the method defined here


def _plain(name: str, leaf: Any) -> Any:
    try:
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().cpu()
            leaf = leaf.float().numpy() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf.numpy()
        array = np.asarray(leaf)
        if array.dtype.kind not in "biuf":
            return float(leaf)
        return array if array.size != 1 else float(array.item())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"metric {name!r} must compute a single number, got {leaf!r}; several may come as a tensor, an array, a "
            "list, a tuple or a dict of numbers"
        ) from error


def _count(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.size
    if is_nest(value):
        return sum(map(_count, value.values() if isinstance(value, dict) else value))
    return 1


def _named(name: str, value: Any) -> Iterator[tuple[str, float]]:
    for key, part in _parts(value):
        yield from _named(f"{name}/{key}", part)
    if not _is_divided(value):
        yield name, value.item() if isinstance(value, np.generic) else value


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif _is_divided(value):
        yield from enumerate(value)


def _is_divided(value: Any) -> bool:
    return is_nest(value) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _filled(name: str, value: Any, written: Mapping[str, float]) -> Any:
    numbers = iter([written.get(each, math.nan) for each, _ in _named(name, value)])
    return map_leaves(
        lambda leaf: (
            np.array([next(numbers) for _ in range(leaf.size)]).reshape(leaf.shape)
            if isinstance(leaf, np.ndarray)
            else next(numbers)
        ),
        value,
    )
