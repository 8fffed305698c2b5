"""Datasets whose batches are dealt to the replicas of a worker, and that keep track of their position."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from paramserver.distribute.core import context
from paramserver.distribute.core.input_context import InputContext
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.input.dealing import Dealing, dealing_to, places
from paramserver.distribute.input.options import InputOptions, InputReplicationMode
from paramserver.distribute.input.share import WHOLE, Seed, Share
from paramserver.distribute.input.sources import Source, has_examples, source_of
from paramserver.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Position:
    """The position of an iteration.

    Attributes:
        epoch: Number of epochs that began before it.
        batches: Number of batches that it has taken from the dataset.
        has_begun: Whether the iteration has begun.
    """

    epoch: int = 0
    batches: int = 0
    has_begun: bool = False


class DistributedDataset(Generic[T]):
    """The replicas' data from a dataset. Each iteration is an epoch and starts from the beginning.

    With one replica a batch is the dataset's own, unchanged. With several it has the same structure, and each leaf is a
    `PerReplica`, which `Strategy.run` takes apart. Iteration blocks as the dataset does. A dataset that is an iterator
    itself, such as a generator, can be iterated over only once. Not thread-safe.

    To continue after a restart, save `state_dict` with the model, load it into a dataset made in the same way, and run
    the remaining epochs:

    >>> import paramserver as ps
    >>> batches = ps.CentralStorageStrategy(["cpu:0"]).distribute_dataset([10, 20, 30])
    >>> next(iter(batches)), batches.state_dict()
    (10, {'epoch': 0, 'batches': 1})
    >>> restarted = ps.CentralStorageStrategy(["cpu:0"]).distribute_dataset([10, 20, 30])
    >>> restarted.load_state_dict({'epoch': 0, 'batches': 1})
    >>> [list(restarted) for epoch in range(restarted.epoch, 2)]
    [[20, 30], [10, 20, 30]]

    Args:
        source: The source of the batches.
        dealing: Converts batches into the replicas' data.
    """

    def __init__(self, source: Source, dealing: Dealing) -> None:
        self._source = source
        self._dealing = dealing
        self._position = Position()

    def __iter__(self) -> Iterator[T]:
        position = self._next_position()
        skip, position.has_begun = position.batches, True
        self._position = position
        return self._dealing.deal(self._counted(self._source.begin(position.epoch, skip), position))

    def __len__(self) -> int:
        """Number of elements in an epoch; with several replicas, the largest possible number.

        Raises:
            TypeError: If the dataset does not know its length.
        """
        return self._dealing.length(len(self._source))

    @property
    def epoch(self) -> int:
        """The epoch of the present iteration, or the next epoch after its end; from 0."""
        return self._position.epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the last iteration: ``epoch``, and the number of its ``batches`` taken so far.

        In the middle of an epoch also the state, as ``dataset``, of a dataset that has a ``state_dict`` itself (as
        torchdata's StatefulDataLoader and Hugging Face's streams have). All else is two ints.
        """
        state: dict[str, Any] = {"epoch": self._position.epoch, "batches": self._position.batches}
        own = self._source.state() if self._position.batches else None
        return state if own is None else {**state, "dataset": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the next iteration where a state was saved.

        Batches that were already taken are not loaded again if a ``DataLoader`` reads a map-style dataset, or the
        dataset has a state of its own; otherwise they are drawn and dropped. A ``DataLoader`` that shuffles needs
        ``InputOptions(seed=...)`` to repeat its order; without a seed the epoch starts from the beginning, with a
        warning. The program must tell `epoch` to a sampler with ``set_epoch``, as it would without restarts.

        Raises:
            ConfigError: If the state is invalid, or holds the state of a dataset of another kind.
        """
        position = _position(state)
        if "dataset" in state:
            self._source.restore(state["dataset"])
        elif position.batches and not self._source.repeats:
            logger.warning(
                "epoch %d starts from its beginning, although %d of its batches were taken before: the DataLoader "
                "shuffles in another order now; to continue in the middle of an epoch, set InputOptions(seed=...)",
                position.epoch,
                position.batches,
            )
            position.batches = 0
        self._position = position

    def __repr__(self) -> str:
        return f"<DistributedDataset in epoch {self._position.epoch}, {self._position.batches} batches taken>"

    def _next_position(self) -> Position:
        last = self._position
        return Position(last.epoch + 1) if last.has_begun else last

    def _counted(self, batches: Iterator[Any], position: Position) -> Iterator[Any]:
        for batch in batches:
            position.batches += 1
            yield batch
        if self._position is position:  # otherwise a later iteration has begun
            self._position = Position(position.epoch + 1)


def distribute_dataset(
    strategy: Worker, dataset: Iterable[Any], options: InputOptions | None
) -> DistributedDataset[Any]:
    """Divide each batch of a dataset among the replicas of this worker.

    Args:
        strategy: The strategy of the replicas.
        dataset: A dataset of *global* batches: a torch DataLoader, with all its settings; a map-style Dataset or
            IterableDataset of batches, of torch or in the torch format of Hugging Face; any other iterable of batches.
            A batch is a nest of tensors, arrays or lists ``[rows, ...]``; with one replica it can be anything. The
            dataset is not changed.
        options: The options; by default every worker reads the whole dataset.

    Returns:
        The dataset to iterate over. If the rows of a batch do not divide evenly among several replicas, the first ones
        get one row more, so that a mean over replicas weighs the rows of uneven batches slightly differently. A batch
        with fewer rows than replicas is left out, since an empty batch has no mean loss. Avoid both with
        ``drop_last=True``.

    Raises:
        NotImplementedError: For the PER_REPLICA mode.
        ValueError: On a task that does not train; for an object that is not a dataset or cannot be sharded; and for
            single examples with several replicas, when the first batch is drawn at the latest.
        RuntimeError: Inside a replica, or inside the scope of another strategy.
    """
    chosen = _checked(options, "distribute_dataset")
    with context.cross_replica(strategy, "distribute_dataset"):
        own = strategy.input_context
        if own.num_replicas_in_sync > 1 and has_examples(dataset):
            raise ConfigError(
                f"distribute_dataset: the items of a {type(dataset).__name__} are examples, which cannot be divided "
                f"among {own.num_replicas_in_sync} replicas; batch them first: wrap it in a torch DataLoader with a "
                "batch_size (of None, if the items are batches)"
            )
        source = source_of(dataset, _share(chosen, own), _seed(chosen, own))
        _say_what_is_read(chosen, own)
        return DistributedDataset(source, dealing_to(places(strategy, chosen.prefetch), is_global=True))


def distribute_datasets_from_function(
    strategy: Worker, fn: Callable[[InputContext], Iterable[Any]], options: InputOptions | None
) -> DistributedDataset[Any]:
    """Deal the batches of a function's dataset to the replicas of this worker, each batch to one replica.

    Args:
        strategy: The strategy of the replicas.
        fn: Called once, in this call, with the part of the input that this worker is to read; returns a dataset of
            *per-replica* batches, of any kind that `distribute_dataset` takes.
        options: The options; sharding is the function's task.

    Returns:
        The dataset to iterate over. With R replicas, R consecutive batches are dealt at a time; an incomplete last
        group is dropped.

    Raises:
        NotImplementedError: For the PER_REPLICA mode.
        ValueError: On a task that does not train, for sharding in the options, or if ``fn`` does not return a dataset.
        RuntimeError: Inside a replica, or inside the scope of another strategy.
    """
    chosen = _checked(options, "distribute_datasets_from_function")
    if chosen.sharding != "none":
        raise ConfigError(
            f"distribute_datasets_from_function: sharding={chosen.sharding!r} is for distribute_dataset; here the "
            "function reads the part that its InputContext names"
        )
    with context.cross_replica(strategy, "distribute_datasets_from_function"):
        own = strategy.input_context
        source = source_of(fn(own), WHOLE, _seed(chosen, own))
        return DistributedDataset(source, dealing_to(places(strategy, chosen.prefetch), is_global=False))


def _checked(options: InputOptions | None, call: str) -> InputOptions:
    chosen = options or InputOptions()
    if not isinstance(chosen, InputOptions):
        raise ConfigError(f"{call}: options: expected InputOptions, got a {type(chosen).__name__}")
    if chosen.replication_mode is InputReplicationMode.PER_REPLICA:
        raise NotImplementedError(
            f"{call}: replication_mode PER_REPLICA is not supported: the replicas of a worker share its input; "
            "use PER_WORKER, and distribute_datasets_from_function for batches of a replica's size"
        )
    return chosen


def _share(options: InputOptions, own: InputContext) -> Share:
    if options.sharding == "static" and not own.num_input_pipelines:
        raise ConfigError(
            "distribute_dataset: sharding='static' needs the number of workers, which the operator of this cluster "
            "does not tell; use sharding='none', which gives each worker all the data in an order of its own"
        )
    return WHOLE if options.sharding == "none" else Share(own.input_pipeline_id, own.num_input_pipelines)


def _seed(options: InputOptions, own: InputContext) -> Seed | None:
    if options.sharding == "static":
        return Seed(options.seed or 0)  # one stream for all workers, which read parts of one order
    return None if options.seed is None else Seed(options.seed, own.input_pipeline_id)


def _say_what_is_read(options: InputOptions, own: InputContext) -> None:
    if own.num_input_pipelines == 1:
        return
    if options.sharding == "static":
        logger.info("%s: this worker reads a part of the dataset of its own", own)
    else:
        logger.info(
            "%s: this worker reads the whole dataset, in an order of its own; "
            "InputOptions(sharding='static') gives each worker a part",
            own,
        )


def _position(state: dict[str, Any]) -> Position:
    def count(name: str) -> int:
        found = state.get(name) if isinstance(state, dict) else None
        if type(found) is not int or found < 0:
            raise ConfigError(
                f"load_state_dict: expected what state_dict() returned, with {name!r} an int from 0 on, got {state!r}"
            )
        return found

    return Position(count("epoch"), count("batches"))
