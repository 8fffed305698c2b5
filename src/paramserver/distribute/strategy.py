"""What every strategy offers to a program; the kinds differ in where variables live.

What needs more than a line stands in modules of its own: `replica_threads` runs functions on replicas, `reduction`
combines values, `updating` changes variables, `input` deals batches.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from paramserver.cluster import ClusterResolver
from paramserver.distribute.bound.optimizer import PreparedOptimizer
from paramserver.distribute.core import context, values
from paramserver.distribute.core.input_context import InputContext, ValueContext
from paramserver.distribute.core.values import PerReplica
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.input import arrays as input_arrays
from paramserver.distribute.input import dataset as input_dataset
from paramserver.distribute.input import iterators as input_iterators
from paramserver.distribute.input import values as input_values
from paramserver.distribute.input.arrays import ArrayDataset
from paramserver.distribute.input.dataset import DistributedDataset
from paramserver.distribute.input.iterators import DistributedIterator
from paramserver.distribute.input.options import InputOptions
from paramserver.distribute.reduce import reduction
from paramserver.distribute.reduce.reduction import Destinations, ReduceOp
from paramserver.distribute.replicas import threads
from paramserver.distribute.variables import creation, updating
from paramserver.distribute.variables.variable import Variable, VariableOptions

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Strategy(Worker):
    """How a program is distributed. Entered with ``with strategy.scope():``."""

    @property
    def extended(self) -> StrategyExtended:
        """What libraries ask of a strategy."""
        return StrategyExtended(self)  # not kept: a circle would hold connections until a collection

    @property
    @abc.abstractmethod
    def cluster_resolver(self) -> ClusterResolver | None:
        """Where the strategy learnt of its cluster."""

    @abc.abstractmethod
    def prepare(self, model: M, optimizer: torch.optim.Optimizer) -> tuple[M, PreparedOptimizer]:
        """Put a model's variables onto parameter servers. See the strategies for what blocks and what is raised."""

    # --- running

    def scope(self) -> contextlib.AbstractContextManager[Strategy]:
        """Put this strategy into effect for a ``with`` block. The object can be entered as often as needed.

        Raises:
            RuntimeError: On entering, inside the scope of another strategy or inside a replica.
        """
        return context.scope(self)

    def run(self, fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call ``fn`` on each replica of this worker. Blocks until all have returned.

        Distributed values among the arguments are taken apart, so that each replica gets its own.

        Returns:
            What the replicas returned, leaf by leaf: with one replica as it is, with several as `PerReplica`, but for
            leaves that are the same object on all of them.

        Raises:
            ValueError: If ``args`` is neither a list nor a tuple.
            RuntimeError: Inside a replica.
        """
        return self.extended.call_for_each_replica(fn, args, kwargs)

    # --- values

    def reduce(self, op: str | ReduceOp, value: Any, axis: int | Sequence[int] | None = None) -> Any:
        """Combine a value of all replicas of this worker into one.

        Args:
            op: ``"sum"`` or ``"mean"``, in any case, or a `ReduceOp`.
            value: What `run` returned.
            axis: Axes to combine inside each replica as well; None combines across replicas only.

        Raises:
            ValueError: If the op is unknown or an axis is out of range.
            TypeError: If ``op`` is no op or ``axis`` no axis.
            RuntimeError: Inside a replica.
        """
        return reduction.reduce(self, op, value, axis)

    def gather(self, value: Any, axis: int) -> Any:
        """Concatenate a value of all replicas along ``axis``, in the order of the replicas.

        Raises:
            NotImplementedError: For sparse tensors.
            RuntimeError: Inside a replica, where `ReplicaContext.all_gather` does it.
        """
        return reduction.gather(self, value, axis)

    def local_results(self, value: Any) -> tuple[Any, ...]:
        """A value's components by replica; of a plain value that value alone."""
        return values.local_results(value)

    # --- variables

    def create_variable(self, options: VariableOptions) -> Variable:
        """What `Variable` does in this strategy's scope, which says of which kind it is and where it lies."""
        return creation.create(self, options)

    # --- input

    def distribute_dataset(
        self, dataset: Iterable[Any], options: InputOptions | None = None
    ) -> DistributedDataset[Any]:
        """The batches of a dataset for this worker's replicas; see `input.dataset`.

        Raises:
            ValueError: On a task that does not train, or for a dataset that cannot be divided among the replicas.
        """
        return input_dataset.distribute_dataset(self, dataset, options)

    def distribute_datasets_from_function(
        self, fn: Callable[[InputContext], Iterable[Any]], options: InputOptions | None = None
    ) -> DistributedDataset[Any]:
        """The batches that a function's dataset gives, one for each replica in turn; see `input.dataset`."""
        return input_dataset.distribute_datasets_from_function(self, fn, options)

    def distribute_values_from_function(self, fn: Callable[[ValueContext], T]) -> PerReplica[T] | T:
        """A value for each replica, by a function that is called for one after the other."""
        return input_values.distribute_values_from_function(self, fn)

    def make_dataset_iterator(self, dataset: Iterable[Any]) -> DistributedIterator[Any]:
        """An iterator over a dataset whose batches are divided among the replicas; see `input.iterators`."""
        return input_iterators.make_dataset_iterator(self, dataset)

    def make_input_fn_iterator(
        self, input_fn: Callable[[InputContext], Any], replication_mode: str = "PER_WORKER"
    ) -> DistributedIterator[Any]:
        """An iterator over what a function gives, one element for each replica in turn; see `input.iterators`."""
        return input_iterators.make_input_fn_iterator(self, input_fn, replication_mode)

    def make_numpy_dataset(self, arrays: Any) -> ArrayDataset:
        """A dataset of the rows of a nest of arrays, which stay on this host; see `input.arrays`."""
        return input_arrays.make_numpy_dataset(self, arrays)

    def __copy__(self) -> NoReturn:
        raise RuntimeError(f"Must only deepcopy {self!r}: a shallow copy would share what belongs to one strategy")


class StrategyExtended:
    """What libraries ask of a strategy, beyond what programs do. Names as in tf.distribute.

    Args:
        strategy: Whose it is.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    @property
    def worker_devices(self) -> tuple[str, ...]:
        """The devices of this worker that compute, one for each replica."""
        return self._strategy.worker_devices

    @property
    def parameter_devices(self) -> tuple[str, ...]:
        """The devices that hold variables, in the order in which they are filled."""
        return self._strategy.parameter_devices

    @property
    def worker_devices_by_replica(self) -> tuple[tuple[str, ...], ...]:
        """The devices of each replica."""
        return tuple((device,) for device in self.worker_devices)

    @property
    def should_init(self) -> bool:
        """Whether this task initializes or restores the variables."""
        return self._strategy.is_chief

    @property
    def should_checkpoint(self) -> bool:
        """Whether this task saves checkpoints."""
        return self._strategy.is_chief

    @property
    def should_save_summary(self) -> bool:
        """Whether this task writes summaries."""
        return self._strategy.is_chief

    @property
    def between_graph(self) -> bool:
        """Every worker runs the same program by itself: always true here."""
        return True

    # --- replicas

    def call_for_each_replica(
        self, fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`Strategy.run`, by its other name."""
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"run: positional args must be a list or tuple, got {type(args).__name__}")
        with context.cross_replica(self._strategy, "run"):
            return threads.call_for_each_replica(self._strategy, fn, args, kwargs or {}, self._strategy.activate)

    def run_steps_on_iterator(self, fn: Callable[..., Any], iterator: object, iterations: int = 1) -> NoReturn:
        """Several steps in one call: not offered, as in the original.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("run_steps_on_iterator: call strategy.run(fn, args=(batch,)) for each batch instead")

    # --- values

    def reduce_to(self, op: str | ReduceOp, value: Any, destinations: Destinations) -> Any:
        """Combine a value of all replicas into one at ``destinations``; see `reduction.reduce_to`."""
        return reduction.reduce_to(self._strategy, op, value, destinations)

    def batch_reduce_to(self, op: str | ReduceOp, pairs: Sequence[tuple[Any, Destinations]]) -> list[Any]:
        """`reduce_to` of several pairs of a value and its destinations."""
        return reduction.batch_reduce_to(self._strategy, op, pairs)

    def broadcast_to(self, value: Any, destinations: Destinations) -> Any:
        """A value on all destinations; see `reduction.broadcast_to`."""
        return reduction.broadcast_to(self._strategy, value, destinations)

    def gather_to(self, value: Any, destinations: Destinations, axis: int) -> Any:
        """`Strategy.gather`, with the result at ``destinations``."""
        return reduction.gather_to(self._strategy, value, destinations, axis)

    # --- variables

    def create_variable(self, options: VariableOptions) -> Variable:
        """`Strategy.create_variable`, by its other name."""
        return self._strategy.create_variable(options)

    def update(
        self,
        variable: Any,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        group: bool = True,
    ) -> Any:
        """Call ``fn(variable, *args, **kwargs)`` to change a variable; see `updating.update`."""
        return updating.update(self._strategy, variable, fn, args, kwargs or {}, group)

    def update_non_slot(
        self,
        colocate_with: Any,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        group: bool = True,
    ) -> Any:
        """Call ``fn(*args, **kwargs)`` once, on a variable's device; see `updating.update_non_slot`."""
        return updating.update_non_slot(self._strategy, colocate_with, fn, args, kwargs or {}, group)

    def read_var(self, variable: Variable) -> torch.Tensor:
        """The present value of a variable, a copy."""
        return updating.read_var(variable)

    def value_container(self, value: Any) -> Any:
        """The variable that a program knows for one that an update function was given."""
        return updating.value_container(value)

    def non_slot_devices(self, variables: Iterable[Variable]) -> Variable:
        """The variable beside which state of no variable lives: the one of the smallest name."""
        return updating.non_slot_devices(variables)

    def colocate_vars_with(self, variable: Variable) -> contextlib.AbstractContextManager[None]:
        """Variables that are created in the ``with`` block go to this variable's ps."""
        return updating.colocate_vars_with(self._strategy, variable)

    def variable_created_in_scope(self, variable: Variable) -> bool:
        """Whether a variable was created in this strategy's scope."""
        return getattr(variable, "strategy", None) is self._strategy
