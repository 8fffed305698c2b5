"""A model applied to batches: on its own device, or on the replicas of a strategy, each of which takes a batch in turn.

Rules
    * Batches are dealt in groups of as many as there are replicas. None is left out: if a group is incomplete, the
      first replicas take one batch each and the others none.
    * Results come back in the order of the batches, so that sums and metrics equal those of one replica.
    * With a strategy, results are moved to the CPU, where metrics and the program are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.central_storage import CentralStorageStrategy
from paramserver.distribute.core import context
from paramserver.distribute.core.input_context import InputContext
from paramserver.distribute.core.nest import map_leaves
from paramserver.distribute.core.values import PerReplica, local_results
from paramserver.distribute.input.dealing import brought
from paramserver.distribute.parameter_server import ParameterServerStrategy
from paramserver.distribute.replicas import threads
from paramserver.errors import ConfigError
from paramserver.estimator.specs import EstimatorSpec

T = TypeVar("T")
R = TypeVar("R")


def own_strategy(eval_distribute: object) -> ParameterServerStrategy | None:
    """Return a strategy of one process over the devices of ``RunConfig.eval_distribute``; None without it.

    The configured strategy is not touched: it may be training at this moment, or belong to a cluster, whose tasks an
    evaluation never talks to.

    Raises:
        ConfigError: If it is not a ParameterServerStrategy.
    """
    if eval_distribute is None:
        return None
    if not isinstance(eval_distribute, ParameterServerStrategy):
        raise ConfigError(
            "eval_distribute: expected a CentralStorageStrategy or a ParameterServerStrategy, got a "
            f"{type(eval_distribute).__name__}"
        )
    return CentralStorageStrategy([f"{device.kind}:{device.index}" for device in eval_distribute.compute_devices])


class ModelReplicas:
    """A model's replicas, without parameter servers.

    Args:
        model: The model, with final values. With a strategy its tensors are moved to the first replica's device.
        strategy: The strategy whose devices compute; None leaves the model where it is.
    """

    def __init__(self, model: nn.Module, strategy: ParameterServerStrategy | None = None) -> None:
        self._strategy = strategy
        devices = [device.torch_device for device in strategy.compute_devices] if strategy else []
        self._tensors = ReplicaTensors(model, (), devices) if strategy else None

    @property
    def count(self) -> int:
        """Number of batches that are taken at a time."""
        return self._strategy.num_replicas_in_sync if self._strategy else 1

    def groups(self, batches: Iterator[T]) -> Iterator[list[T]]:
        """Yield the batches, as many at a time as there are replicas; the last group may be smaller."""
        while group := list(islice(batches, self.count)):
            yield group

    def apply(self, fn: Callable[[Any], R], group: Sequence[Any]) -> list[R]:
        """Return ``fn`` of each batch of a group, in order, each computed on a replica of its own. Blocks.

        Raises:
            Exception: Any exception of ``fn``.
        """
        if self._strategy is None or self._tensors is None:  # the two are None together
            return [fn(batch) for batch in group]
        places = self._tensors.devices
        dealt = [brought(batch, place) for batch, place in zip(group, places, strict=False)]
        idle = [_IDLE] * (len(places) - len(dealt))
        with context.cross_replica(self._strategy, "evaluation"):
            made = threads.call_for_each_replica(
                self._strategy, _applied, (fn, PerReplica([*dealt, *idle])), {}, self._tensors.activate
            )
        return [on_cpu(each.value) for each in local_results(made)[: len(dealt)]]

    def __repr__(self) -> str:
        return f"<ModelReplicas: {self.count} on {self._strategy or 'the device of the model'}>"


def replicas_of(spec: EstimatorSpec, strategy: ParameterServerStrategy | None) -> ModelReplicas:
    """Return the replicas of a spec's model."""
    assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
    return ModelReplicas(spec.model, strategy)


def input_context(strategy: ParameterServerStrategy | None) -> InputContext:
    """Return the input context for the input_fn of such replicas."""
    return strategy.input_context if strategy else InputContext()


def on_cpu(value: Any) -> Any:
    """Return the same nest with its tensors on the CPU. Blocks until they are there."""
    return map_leaves(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, value)


@dataclass(frozen=True)
class _Made(Generic[R]):
    """A replica's result, kept in one piece: results of different replicas may differ in structure."""

    value: R


_IDLE = object()


def _applied(fn: Callable[[Any], R], batch: Any) -> _Made[R | None]:
    return _Made(None if batch is _IDLE else fn(batch))
