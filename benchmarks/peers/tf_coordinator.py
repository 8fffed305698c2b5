"""A task of TensorFlow's ParameterServerStrategyV2: a coordinator that schedules steps on workers.

Only the coordinator sees steps: it schedules some, which the workers take as they get to them, and joins them.
"""

from __future__ import annotations

import time
from typing import Any

import tensorflow as tf  # type: ignore[import-untyped]  # installed for this peer only

from benchmarks.harness.participant import take_part
from benchmarks.peers.assignment import Assignment, read_assignment
from benchmarks.peers.tf_models import MODELS

JOIN_SECONDS = 0.5
"""Approximate duration of steps that are joined together; it is long beside the workers' idle time at a join."""


class Coordinator:
    """Trains on the workers of a cluster."""

    def __init__(self, assignment: Assignment, resolver: Any) -> None:
        self._model = MODELS[assignment.model]
        self._strategy = tf.distribute.ParameterServerStrategy(resolver)
        self._coordinator = tf.distribute.coordinator.ClusterCoordinator(self._strategy)
        with self._strategy.scope():
            self._variables = [tf.Variable(make()) for make in self._model.initial_values()]
            self._optimizer = self._model.optimizer()
        self._batches = iter(self._coordinator.create_per_worker_dataset(self._model.dataset))
        self._step = tf.function(self._train)
        self._last: Any = None

    def train(self, steps: int) -> None:
        """Take steps, spread over the workers. Blocks."""
        for _ in range(steps):
            self._last = self._coordinator.schedule(self._step, args=(self._batches,))
        self._coordinator.join()

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self._last.fetch())

    def _train(self, batches: Any) -> Any:
        return self._strategy.run(self._train_replica, args=next(batches))

    def _train_replica(self, features: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = self._model.mean_loss(self._variables, features, labels)
        gradients = tape.gradient(loss, self._variables)
        self._optimizer.apply_gradients(zip(gradients, self._variables, strict=True))
        return loss


def serve(assignment: Assignment, resolver: Any) -> None:
    """Be a worker or a ps until killed."""
    # As many operators at once as TensorFlow likes: with one, workers wait for the ps with the thread that it needs.
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=assignment.threads)
    server = tf.distribute.Server(
        resolver.cluster_spec(), job_name=assignment.role, task_index=assignment.index, config=config
    )
    server.join()


def main(assignment: Assignment) -> None:
    """Be the task that TF_CONFIG names; the coordinator takes part until the input ends."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver(rpc_layer="grpc")
    if assignment.role != "chief":
        serve(assignment, resolver)
        return
    tf.config.threading.set_intra_op_parallelism_threads(assignment.threads)
    coordinator = Coordinator(assignment, resolver)
    steps = _steps_together(coordinator)

    def step() -> int:
        coordinator.train(steps)
        return 0

    take_part(step, coordinator.loss, stride=steps)


def _steps_together(coordinator: Coordinator) -> int:
    coordinator.train(8)
    begun = time.monotonic()
    coordinator.train(8)
    return max(4, round(8 * JOIN_SECONDS / (time.monotonic() - begun)))


if __name__ == "__main__":
    main(read_assignment())
