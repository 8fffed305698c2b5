"""What every strategy offers to a program; the kinds differ in where variables live."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from paramserver.cluster import ClusterResolver
from paramserver.distribute import context, reduction
from paramserver.distribute.input import DistributedDataset
from paramserver.distribute.prepared_optimizer import PreparedOptimizer
from paramserver.distribute.reduction import ReduceOp

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class StrategyExtended(abc.ABC):
    """What libraries ask of a strategy, beyond what programs do. Names as in tf.distribute."""

    @property
    @abc.abstractmethod
    def worker_devices(self) -> tuple[str, ...]:
        """The devices of this worker that compute, one for each replica."""

    @property
    @abc.abstractmethod
    def parameter_devices(self) -> tuple[str, ...]:
        """The devices that hold variables, in the order in which they are filled."""

    @property
    def worker_devices_by_replica(self) -> tuple[tuple[str, ...], ...]:
        """The devices of each replica."""
        return tuple((device,) for device in self.worker_devices)

    @property
    @abc.abstractmethod
    def should_init(self) -> bool:
        """Whether this task initializes or restores the variables."""

    @property
    @abc.abstractmethod
    def should_checkpoint(self) -> bool:
        """Whether this task saves checkpoints."""

    @property
    @abc.abstractmethod
    def should_save_summary(self) -> bool:
        """Whether this task writes summaries."""

    @property
    def between_graph(self) -> bool:
        """Every worker runs the same program by itself: always true here (W01)."""
        return True


class Strategy(abc.ABC):
    """How a program is distributed. Entered with ``with strategy.scope():``."""

    @property
    @abc.abstractmethod
    def extended(self) -> StrategyExtended:
        """What libraries ask of a strategy."""

    @property
    @abc.abstractmethod
    def cluster_resolver(self) -> ClusterResolver | None:
        """Where the strategy learnt of its cluster."""

    @abc.abstractmethod
    def prepare(self, model: M, optimizer: torch.optim.Optimizer) -> tuple[M, PreparedOptimizer]:
        """Put a model's variables onto parameter servers. See the strategies for what blocks and what is raised."""

    @property
    def num_replicas_in_sync(self) -> int:
        """The replicas of this worker, whose gradients become one update (W06)."""
        return len(self.extended.worker_devices)

    def scope(self) -> contextlib.AbstractContextManager[Strategy]:
        """Put this strategy into effect for a ``with`` block.

        Raises:
            RuntimeError: On entering, inside the scope of another strategy.
        """
        return context.entered(self)

    def run(self, fn: Callable[..., T], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> T:
        """Call ``fn`` on each replica of this worker and return what it returns.

        Raises:
            ValueError: If ``args`` is neither a list nor a tuple.
        """
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"run: positional args must be a list or tuple, got {type(args).__name__}")
        with self.scope():
            return fn(*args, **(kwargs or {}))

    def reduce(self, op: str | ReduceOp, value: torch.Tensor, axis: int | Sequence[int] | None = None) -> torch.Tensor:
        """Combine a value of all replicas of this worker into one.

        Args:
            op: ``"sum"`` or ``"mean"``, in any case, or a `ReduceOp`.
            value: What `run` returned.
            axis: Axes to combine inside each replica as well; None combines across replicas only.

        Raises:
            ValueError: If the op is unknown or an axis is out of range.
            TypeError: If ``op`` is no op or ``axis`` no axis.
        """
        return reduction.reduce(op, value, axis)

    def distribute_dataset(self, dataset: Iterable[T]) -> DistributedDataset[T]:
        """The batches of a dataset for this worker.

        Every worker sees the whole dataset, in its own order where it is shuffled: `prepare` has given every worker a
        random stream of its own. ``dataset`` is a DataLoader or any iterable of batches; it is not changed.

        Raises:
            ValueError: On a task that does not train.
        """
        return DistributedDataset(dataset)
