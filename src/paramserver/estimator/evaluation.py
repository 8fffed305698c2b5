"""One evaluation of one checkpoint, on one task, in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import nn

from paramserver.errors import ConfigError
from paramserver.estimator.calling import Batch, as_loss
from paramserver.estimator.hooks import HookRunner, RunValues, TrainingHook
from paramserver.estimator.specs import EstimatorSpec


@dataclass(frozen=True, kw_only=True)
class EvaluationSession:
    """What hooks see as ``session`` during an evaluation.

    Attributes:
        global_step: Of the checkpoint that is evaluated.
        task: Which task evaluates.
        model_dir: Where the checkpoints lie.
        is_chief: Always False: an evaluation writes no checkpoint.
    """

    global_step: int
    task: str
    model_dir: str
    is_chief: bool = False

    def save(self) -> NoReturn:
        """Refused. Raises ConfigError."""
        raise ConfigError(f"save: {self.task} evaluates a checkpoint, and only a training can write one")

    def should_stop(self) -> bool:
        """Never: the input or a hook ends it."""
        return False


def evaluate(
    spec: EstimatorSpec,
    batches: Iterator[Batch],
    steps: int | None,
    session: EvaluationSession,
    hooks: Sequence[TrainingHook] = (),
) -> dict[str, float]:
    """The metrics of a model over its input, and ``loss``, the mean over the batches.

    Args:
        spec: What the model_fn returned for EVAL, its model filled already. Metrics get predictions and labels: what
            ``predict_fn`` or else the model makes of the features.
        batches: The input.
        steps: How many batches, None for all.
        session: Shown to the hooks.
        hooks: Called around every batch; may end the evaluation early.

    Raises:
        ConfigError: If there is no batch, or a metric is no single number.
    """
    tally = _Tally(spec, session.global_step)
    runner = HookRunner(hooks)
    runner.begin()
    runner.after_create_session(session)
    with torch.inference_mode():
        for features, labels in islice(batches, steps):
            runner.step(partial(tally.add, features, labels))
            if runner.stop_requested:
                break
        results = tally.results()
    runner.end(session)
    return results


class _Tally:
    """The loss and the metrics so far."""

    def __init__(self, spec: EstimatorSpec, global_step: int) -> None:
        assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
        assert spec.loss_fn is not None  # noqa: S101
        self._spec, self._model, self._loss_fn = spec, spec.model.eval(), spec.loss_fn
        self._global_step = global_step
        self._total, self._count = 0.0, 0
        for metric in spec.eval_metrics.values():
            metric.reset()

    def add(self, features: Any, labels: Any) -> RunValues:
        with _watched(self._model) as outputs:
            loss = as_loss(self._loss_fn(self._model, features, labels))
        self._total += float(loss)
        self._count += 1
        if self._spec.eval_metrics:
            predictions = self._predictions(features, outputs)
            for metric in self._spec.eval_metrics.values():
                metric.update(predictions, labels)
        return RunValues(loss, self._global_step, 0)

    def results(self) -> dict[str, float]:
        if not self._count:
            raise ConfigError("evaluate: the input_fn gave no batch; expected at least one")
        results = {name: _number(name, metric.compute()) for name, metric in self._spec.eval_metrics.items()}
        return {**results, "loss": self._total / self._count}

    def _predictions(self, features: Any, outputs: list[Any]) -> Any:
        if self._spec.predict_fn is not None:
            return self._spec.predict_fn(self._model, features)
        return outputs[0] if len(outputs) == 1 else self._model(features)


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[Any]]:
    """What the model returns inside the block, so that a metric need not compute it again."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metric {name!r} must compute a single number, got {value!r}") from error
