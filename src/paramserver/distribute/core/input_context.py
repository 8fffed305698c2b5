"""The arguments of input functions and value functions: the worker or replica that a function is called for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputContext:
    """The part of the input that a task is to read.

    Attributes:
        num_input_pipelines: Number of workers that read input, including the chief; 0 if it is not known, because the
            workers of the cluster come and go.
        input_pipeline_id: The index of this worker among them.
        num_replicas_in_sync: Number of replicas of this worker.
    """

    num_input_pipelines: int = 1
    input_pipeline_id: int = 0
    num_replicas_in_sync: int = 1

    def get_per_replica_batch_size(self, global_batch_size: int) -> int:
        """Return the batch size of one replica.

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
        return f"input pipeline {self.input_pipeline_id} of {self.num_input_pipelines or 'an unknown number'}"


@dataclass(frozen=True)
class ValueContext:
    """The replica that a value is made for.

    Attributes:
        replica_id_in_sync_group: The index of the replica, from 0.
        num_replicas_in_sync: Number of replicas of this worker.
    """

    replica_id_in_sync_group: int = 0
    num_replicas_in_sync: int = 1

    def __str__(self) -> str:
        return f"replica {self.replica_id_in_sync_group} of {self.num_replicas_in_sync}"
