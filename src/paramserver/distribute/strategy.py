"""The interface that every strategy offers to a program. Strategies differ in where their variables live.

Work that needs more than a line is done in other modules: `replicas.threads` runs functions on replicas,
`reduce.reduction` combines values, `variables.updating` changes variables, and `input` deals batches.
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
    """The way in which a program is distributed. Enter it with ``with strategy.scope():``."""

    @property
    def extended(self) -> StrategyExtended:
        """The calls that libraries, rather than programs, make on a strategy."""
        return StrategyExtended(self)  # not kept: a circle would hold connections until a collection

    @property
    @abc.abstractmethod
    def cluster_resolver(self) -> ClusterResolver | None:
        """The resolver that the strategy read its cluster from; None if there is none."""

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
        """Call ``fn`` on each replica of this worker. Blocks until all calls have returned.

        Distributed values among the arguments are taken apart: each replica gets its own component.

        Returns:
            The results of all replicas, combined leaf by leaf. With one replica the result itself; with several, each
            leaf is a `PerReplica`, except that an object that every replica returns is returned as it is.

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
            value: A result of `run`.
            axis: Axes to combine inside each replica as well; None combines across replicas only.

        Raises:
            ValueError: If the op is unknown or an axis is out of range.
            TypeError: If ``op`` or ``axis`` has the wrong type.
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
        """Return a value's components in the order of the replicas; for a plain value, a tuple of that value alone."""
        return values.local_results(value)

    # --- variables

    def create_variable(self, options: VariableOptions) -> Variable:
        """Create a program's own `Variable`; this strategy chooses its kind and its ps."""
        return creation.create(self, options)

    # --- input

    def distribute_dataset(
        self, dataset: Iterable[Any], options: InputOptions | None = None
    ) -> DistributedDataset[Any]:
        """Divide the batches of a dataset among this worker's replicas; see `input.dataset`.

        Raises:
            ValueError: On a task that does not train, or for a dataset that cannot be divided among the replicas.
        """
        return input_dataset.distribute_dataset(self, dataset, options)

    def distribute_datasets_from_function(
        self, fn: Callable[[InputContext], Iterable[Any]], options: InputOptions | None = None
    ) -> DistributedDataset[Any]:
        """Deal the batches of a function's dataset to the replicas, one each in turn; see `input.dataset`."""
        return input_dataset.distribute_datasets_from_function(self, fn, options)

    def distribute_values_from_function(self, fn: Callable[[ValueContext], T]) -> PerReplica[T] | T:
        """Call a function for one replica after the other and return the values, one for each replica."""
        return input_values.distribute_values_from_function(self, fn)

    def make_dataset_iterator(self, dataset: Iterable[Any]) -> DistributedIterator[Any]:
        """Return an iterator that divides each batch of a dataset among the replicas; see `input.iterators`."""
        return input_iterators.make_dataset_iterator(self, dataset)

    def make_input_fn_iterator(
        self, input_fn: Callable[[InputContext], Any], replication_mode: str = "PER_WORKER"
    ) -> DistributedIterator[Any]:
        """Return an iterator over a function's elements, one for each replica in turn; see `input.iterators`."""
        return input_iterators.make_input_fn_iterator(self, input_fn, replication_mode)

    def make_numpy_dataset(self, arrays: Any) -> ArrayDataset:
        """Return a dataset of the rows of a nest of arrays, which stay on this host; see `input.arrays`."""
        return input_arrays.make_numpy_dataset(self, arrays)

    def __copy__(self) -> NoReturn:
        raise RuntimeError(f"Must only deepcopy {self!r}: a shallow copy would share what belongs to one strategy")


class StrategyExtended:
    """The calls that libraries make on a strategy, beyond those of programs. Names as in tf.distribute.

    Args:
        strategy: The strategy that the calls act on.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    @property
    def worker_devices(self) -> tuple[str, ...]:
        """The compute devices of this worker, one for each replica."""
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
        """Whether every worker runs the same program by itself: always true here."""
        return True

    # --- replicas

    def call_for_each_replica(
        self, fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function on each replica: another name of `Strategy.run`."""
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"run: positional args must be a list or tuple, got {type(args).__name__}")
        with context.cross_replica(self._strategy, "run"):
            return threads.call_for_each_replica(self._strategy, fn, args, kwargs or {}, self._strategy.activate)

    def run_steps_on_iterator(self, fn: Callable[..., Any], iterator: object, iterations: int = 1) -> NoReturn:
        """Refuse to run several steps in one call, as tf.distribute's ParameterServerStrategy does.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("run_steps_on_iterator: call strategy.run(fn, args=(batch,)) for each batch instead")

    # --- values

    def reduce_to(self, op: str | ReduceOp, value: Any, destinations: Destinations) -> Any:
        """Combine a value of all replicas into one at ``destinations``; see `reduction.reduce_to`."""
        return reduction.reduce_to(self._strategy, op, value, destinations)

    def batch_reduce_to(self, op: str | ReduceOp, pairs: Sequence[tuple[Any, Destinations]]) -> list[Any]:
        """Combine several values, each to its own destinations, as `reduce_to` does."""
        return reduction.batch_reduce_to(self._strategy, op, pairs)

    def broadcast_to(self, value: Any, destinations: Destinations) -> Any:
        """Copy a value to all destinations; see `reduction.broadcast_to`."""
        return reduction.broadcast_to(self._strategy, value, destinations)

    def gather_to(self, value: Any, destinations: Destinations, axis: int) -> Any:
        """Concatenate a value of all replicas at ``destinations``, as `Strategy.gather` does."""
        return reduction.gather_to(self._strategy, value, destinations, axis)

    # --- variables

    def create_variable(self, options: VariableOptions) -> Variable:
        """Create a variable: another name of `Strategy.create_variable`."""
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
        """Return a copy of a variable's present value."""
        return updating.read_var(variable)

    def value_container(self, value: Any) -> Any:
        """Return the variable that the program created, given the one that an update function received."""
        return updating.value_container(value)

    def non_slot_devices(self, variables: Iterable[Variable]) -> Variable:
        """Return the variable to place shared optimizer state beside: the one with the smallest name."""
        return updating.non_slot_devices(variables)

    def colocate_vars_with(self, variable: Variable) -> contextlib.AbstractContextManager[None]:
        """Create variables in the ``with`` block on this variable's ps."""
        return updating.colocate_vars_with(self._strategy, variable)

    def variable_created_in_scope(self, variable: Variable) -> bool:
        """Return whether a variable was created in this strategy's scope."""
        return getattr(variable, "strategy", None) is self._strategy
