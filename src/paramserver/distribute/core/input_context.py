"""What an input function is told of the worker, and a value function of the replica, that it is called for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputContext:
    """Which part of the input a task is to read.

    Attributes:
        num_input_pipelines: How many workers read input, the chief among them.
        input_pipeline_id: Which of them this one is.
        num_replicas_in_sync: Replicas of this worker.
    """

    num_input_pipelines: int = 1
    input_pipeline_id: int = 0
    num_replicas_in_sync: int = 1

    def get_per_replica_batch_size(self, global_batch_size: int) -> int:
        """The batch of one replica.

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


@dataclass(frozen=True)
class ValueContext:
    """Which replica a value is made for.

    Attributes:
        replica_id_in_sync_group: The replica, from 0.
        num_replicas_in_sync: Replicas of this worker.
    """

    replica_id_in_sync_group: int = 0
    num_replicas_in_sync: int = 1

    def __str__(self) -> str:
        return f"replica {self.replica_id_in_sync_group} of {self.num_replicas_in_sync}"
