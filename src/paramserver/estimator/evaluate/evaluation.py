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

from paramserver.distribute.bound.step_times import StepTimes
from paramserver.errors import ConfigError
from paramserver.estimator.calling import Batch, as_loss
from paramserver.estimator.evaluate.inference import ModelReplicas
from paramserver.estimator.evaluate.results import as_result
from paramserver.estimator.hooks.hook import HookRunner, RunValues, TrainingHook
from paramserver.estimator.specs import EstimatorSpec


@dataclass(frozen=True, kw_only=True)
class EvaluationSession:
    """The ``session`` that hooks see during an evaluation or a prediction.

    Attributes:
        global_step: The global step of the checkpoint.
        task: The name of the task that reads the checkpoint.
        model_dir: The folder of the checkpoints.
        is_chief: Always False: neither an evaluation nor a prediction writes a checkpoint.
    """

    global_step: int
    task: str
    model_dir: str
    is_chief: bool = False

    def read_global_step(self) -> int:
        """Return the global step of the checkpoint, which never changes."""
        return self.global_step

    def refresh(self) -> int:
        """Do nothing, since a checkpoint never changes; return the global step."""
        return self.global_step

    def values(self) -> NoReturn:
        """Refuse to return values. Raises ConfigError."""
        raise ConfigError(f"values: {self.task} reads a checkpoint; a training has values of its own")

    def save(self) -> NoReturn:
        """Refuse to write a checkpoint. Raises ConfigError."""
        raise ConfigError(f"save: {self.task} reads a checkpoint, and only a training can write one")

    def statistics(self) -> StepTimes:
        """Return times of zero: nothing is pushed."""
        return StepTimes(0, 0.0, 0.0, 0.0, ())

    def should_stop(self) -> bool:
        """Return False: only the input or a hook ends an evaluation."""
        return False


def evaluate(
    spec: EstimatorSpec,
    batches: Iterator[Batch],
    steps: int | None,
    session: EvaluationSession,
    hooks: Sequence[TrainingHook] = (),
    replicas: ModelReplicas | None = None,
) -> dict[str, Any]:
    """Return the metrics of a model over its input, and ``loss``, the mean over the batches. Blocks.

    Args:
        spec: The result of the model_fn for EVAL, with final values in its model. Metrics get the labels and the
            predictions, which are the result of ``predict_fn`` or else of the model.
        batches: The input.
        steps: Number of batches; None takes all.
        session: The session for the hooks.
        hooks: Called around every batch, or around each group of batches that several replicas take; may end the
            evaluation early.
        replicas: The replicas of the spec's model; by default one, on the device of the model.

    Raises:
        ConfigError: If there is no batch, or a metric is neither a number nor a nest of numbers.
    """
    assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
    replicas = replicas or ModelReplicas(spec.model)
    tally = _Tally(spec, session.global_step, replicas)
    runner = HookRunner(hooks)
    runner.begin()
    runner.after_create_session(session)
    with torch.inference_mode():
        for group in replicas.groups(islice(batches, steps)):
            runner.step(partial(tally.add, group))
            if runner.stop_requested:
                break
        results = tally.results()
    runner.end(session)
    return results


class _Tally:
    """The loss and the metrics so far."""

    def __init__(self, spec: EstimatorSpec, global_step: int, replicas: ModelReplicas) -> None:
        assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
        assert spec.loss_fn is not None  # noqa: S101
        self._spec, self._model, self._loss_fn = spec, spec.model.eval(), spec.loss_fn
        self._global_step = global_step
        self._replicas = replicas
        self._total, self._count = 0.0, 0
        for metric in spec.eval_metrics.values():
            metric.reset()

    def add(self, group: list[Batch]) -> RunValues:
        """Take a group of batches into account. The returned loss is the mean over the group."""
        before = self._total
        for (_, labels), (loss, predictions) in zip(group, self._replicas.apply(self._computed, group), strict=True):
            self._total += float(loss)
            self._count += 1
            for metric in self._spec.eval_metrics.values():
                metric.update(predictions, labels)
        return RunValues((self._total - before) / len(group), self._global_step, 0)

    def results(self) -> dict[str, Any]:
        if not self._count:
            raise ConfigError("evaluate: the input_fn gave no batch; expected at least one")
        results = {name: as_result(name, metric.compute()) for name, metric in self._spec.eval_metrics.items()}
        return {**results, "loss": self._total / self._count}

    def _computed(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Return the loss of a batch, and the predictions if there are metrics. Called on each replica."""
        features, labels = batch
        with _watched(self._model) as outputs:
            loss = as_loss(self._loss_fn(self._model, features, labels))
        return loss, self._predictions(features, outputs) if self._spec.eval_metrics else None

    def _predictions(self, features: Any, outputs: list[Any]) -> Any:
        if self._spec.predict_fn is not None:
            return self._spec.predict_fn(self._model, features)
        return outputs[0] if len(outputs) == 1 else self._model(features)


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[Any]]:
    """Collect the outputs of the model inside the block, so that metrics need not compute them again."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
