"""One evaluation of one checkpoint, on one task, in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from paramserver.errors import ConfigError
from paramserver.estimator.calling import Batch
from paramserver.estimator.specs import EstimatorSpec


def evaluate(spec: EstimatorSpec, batches: Iterator[Batch], steps: int | None) -> dict[str, float]:
    """The metrics of a model over its input, and ``loss``, the mean over the batches.

    Args:
        spec: What the model_fn returned for EVAL, its model filled already. Metrics get predictions and labels: what
            ``predict_fn`` or else the model makes of the features.
        batches: The input.
        steps: How many batches, None for all.

    Raises:
        ConfigError: If there is no batch, or a metric is no single number.
    """
    assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
    assert spec.loss_fn is not None  # noqa: S101
    spec.model.eval()
    for metric in spec.eval_metrics.values():
        metric.reset()
    total, count = 0.0, 0
    with torch.inference_mode():
        for features, labels in islice(batches, steps):
            with _watched(spec.model) as outputs:
                total += float(spec.loss_fn(spec.model, features, labels))
            count += 1
            if spec.eval_metrics:
                predictions = _predictions(spec, features, outputs)
                for metric in spec.eval_metrics.values():
                    metric.update(predictions, labels)
    if not count:
        raise ConfigError("evaluate: the input_fn gave no batch; expected at least one")
    results = {name: _number(name, metric.compute()) for name, metric in spec.eval_metrics.items()}
    return {**results, "loss": total / count}


def _predictions(spec: EstimatorSpec, features: Any, outputs: list[Any]) -> Any:  # noqa: ANN401  # the user's own
    if spec.predict_fn is not None:
        return spec.predict_fn(spec.model, features)
    assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
    return outputs[0] if len(outputs) == 1 else spec.model(features)


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[Any]]:
    """What the model returns inside the block, so that a metric need not compute it again."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _number(name: str, value: Any) -> float:  # noqa: ANN401  # the user's own metric
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metric {name!r} must compute a single number, got {value!r}") from error
