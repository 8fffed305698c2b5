"""The input of a worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class InputContext:
    """Which part of the input a task is to read (I01).

    Attributes:
        num_input_pipelines: How many workers read input, the chief among them.
        input_pipeline_id: Which of them this one is.
        num_replicas_in_sync: Replicas of this worker.
    """

    num_input_pipelines: int = 1
    input_pipeline_id: int = 0
    num_replicas_in_sync: int = 1

    def get_per_replica_batch_size(self, global_batch_size: int) -> int:
        """The batch of one replica (I02).

        Raises:
            ValueError: If the replicas cannot share the global batch evenly.
        """
        if global_batch_size % self.num_replicas_in_sync:
            raise ValueError(
                f"a global batch of {global_batch_size} cannot be divided evenly among "
                f"{self.num_replicas_in_sync} replicas"
            )
        return global_batch_size // self.num_replicas_in_sync

    def __str__(self) -> str:
        return f"input pipeline {self.input_pipeline_id} of {self.num_input_pipelines}"


class DistributedDataset(Generic[T]):
    """Iterates over a dataset's batches. Each iteration begins anew."""

    def __init__(self, dataset: Iterable[T]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[T]:
        return iter(self._dataset)

    def __len__(self) -> int:
        """The number of batches.

        Raises:
            TypeError: If the dataset does not know it.
        """
        return len(self._dataset)  # type: ignore[arg-type]  # it says so itself if it has none
