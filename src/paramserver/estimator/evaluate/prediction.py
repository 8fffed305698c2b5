"""Predictions of a model for each batch, whole or row by row."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from paramserver.distribute.core.nest import is_nest, map_leaves
from paramserver.distribute.input.dealing import is_column
from paramserver.errors import ConfigError
from paramserver.estimator.evaluate.evaluation import EvaluationSession
from paramserver.estimator.evaluate.inference import ModelReplicas, on_cpu
from paramserver.estimator.hooks.hook import HookRunner, RunValues, TrainingHook
from paramserver.estimator.specs import EstimatorSpec


def predict(
    spec: EstimatorSpec,
    features: Iterator[Any],
    session: EvaluationSession,
    hooks: Sequence[TrainingHook],
    replicas: ModelReplicas,
) -> Generator[Any, None, None]:
    """Yield the predictions for each batch, on the CPU, in the order of the batches.

    Args:
        spec: The result of the model_fn for PREDICT, with final values in its model.
        features: The input.
        session: The session for the hooks.
        hooks: Called around every batch, or around each group of batches that several replicas take; may end the
            prediction early. The hooks see a loss of NaN.
        replicas: The replicas of the spec's model.
    """
    assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
    spec.model.eval()
    runner = HookRunner(hooks)
    runner.begin()
    runner.after_create_session(session)
    for group in replicas.groups(features):
        made: list[Any] = []
        runner.step(partial(_step, spec, replicas, group, made, session.global_step))
        yield from made
        if runner.stop_requested:
            break
    runner.end(session)


def checked_keys(predict_keys: object) -> tuple[str, ...] | None:
    """Return the ``predict_keys`` of `Estimator.predict` as a tuple; a single name becomes a tuple of it.

    Raises:
        ConfigError: If they are neither a name nor a list of names.
    """
    if predict_keys is None:
        return None
    keys = (predict_keys,) if isinstance(predict_keys, str) else predict_keys
    if isinstance(keys, (list, tuple, set, frozenset)) and keys and all(isinstance(key, str) for key in keys):
        return tuple(keys)
    raise ConfigError(f"predict: predict_keys: expected names of predictions, got {predict_keys!r}")


def selected(predictions: Any, keys: Sequence[str] | None) -> Any:
    """Return the predictions with the given names.

    >>> selected({"class": 1, "scores": 2}, ["class", "other"])
    {'class': 1}

    Raises:
        ConfigError: If no prediction has one of the names.
    """
    if keys is None:
        return predictions
    if not isinstance(predictions, Mapping):
        raise ConfigError(
            f"predict: predict_keys {list(keys)} choose from a dict of predictions, and these are a "
            f"{type(predictions).__name__}; leave predict_keys out, or let predict_fn return a dict"
        )
    found = {key: value for key, value in predictions.items() if key in keys}
    if not found:
        raise ConfigError(f"predict: predict_keys: expected some of {sorted(predictions)}, got {list(keys)}")
    return found


def rows(predictions: Any) -> Iterator[Any]:
    """Yield the predictions for one example after the other: of each leaf its row.

    >>> [row["class"].item() for row in rows({"class": torch.tensor([3, 5])})]
    [3, 5]

    Raises:
        ConfigError: If the leaves have different numbers of rows, or a leaf has no rows.
    """
    lengths: dict[str, int] = {}
    _measure(predictions, "", lengths)
    if len(set(lengths.values())) != 1:
        raise ConfigError(
            "predict: expected predictions with one number of rows, got "
            f"{', '.join(f'{length} of {name}' for name, length in lengths.items()) or 'none'}; "
            "yield_single_examples=False gives whole batches"
        )
    for index in range(next(iter(lengths.values()))):
        yield map_leaves(partial(_row, index), predictions, is_leaf=is_column)


def _step(
    spec: EstimatorSpec, replicas: ModelReplicas, group: list[Any], made: list[Any], global_step: int
) -> RunValues:
    with torch.inference_mode():
        made += map(on_cpu, replicas.apply(partial(_predicted, spec), group))
    return RunValues(math.nan, global_step, 0)


def _predicted(spec: EstimatorSpec, features: Any) -> Any:
    assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
    return spec.model(features) if spec.predict_fn is None else spec.predict_fn(spec.model, features)


def _measure(part: Any, name: str, lengths: dict[str, int]) -> None:
    """Note the number of rows of each leaf under a name that shows its place in the nest."""
    if is_nest(part) and not is_column(part):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        for key, value in items:
            _measure(value, f"{name}[{key!r}]", lengths)
    elif part is not None:
        lengths[f"predictions{name}"] = _length(part, f"predictions{name}")


def _row(index: int, leaf: Any) -> Any:
    return None if leaf is None else leaf[index]


def _length(leaf: Any, name: str) -> int:
    is_array = isinstance(leaf, (torch.Tensor, np.ndarray))
    if (is_array and leaf.ndim) or is_column(leaf):
        return len(leaf)
    shape = f" of shape {list(leaf.shape)}" if is_array else ""
    raise ConfigError(
        f"predict: {name} has no rows: expected a tensor, array or list with a leading batch dimension, got a "
        f"{type(leaf).__name__}{shape}; yield_single_examples=False gives whole batches"
    )
