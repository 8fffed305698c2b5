"""A task of TensorFlow's Estimator with ParameterServerStrategyV1: the original of paramserver.

The Estimator's loop is its own: a hook holds each step until the participant, on a thread, asks for it.
"""

from __future__ import annotations

import threading
from typing import Any

import tensorflow as tf  # type: ignore[import-untyped]  # installed for this peer only

from benchmarks.harness.participant import take_part
from benchmarks.peers.assignment import Assignment, read_assignment
from benchmarks.peers.tf_models import MODELS, TfModel


class Turnstile(tf.compat.v1.train.SessionRunHook):  # type: ignore[misc]  # TensorFlow ships no types
    """Lets the loop take one step for each call of `step`."""

    def __init__(self) -> None:
        self._wanted = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._is_over = False
        self._loss: Any = None
        self._last_loss = 0.0

    def begin(self) -> None:
        self._loss = tf.compat.v1.losses.get_losses()[0]
        threading.Thread(target=self._participate, daemon=True).start()

    def before_run(self, run_context: Any) -> Any:
        self._wanted.acquire()
        return tf.compat.v1.train.SessionRunArgs(self._loss)

    def after_run(self, run_context: Any, run_values: Any) -> None:
        self._last_loss = float(run_values.results)
        if self._is_over:
            run_context.request_stop()
        self._done.release()

    def step(self) -> int:
        """Let the loop take one step. Blocks until it is done."""
        self._wanted.release()
        self._done.acquire()
        return 0

    def _participate(self) -> None:
        take_part(self.step, lambda: self._last_loss)
        self._is_over = True
        self._wanted.release()  # one more step, after which the loop is told


def model_fn(features: Any, labels: Any, params: TfModel) -> Any:
    """Return the model as an Estimator needs it."""
    values = params.initial_values()
    variables = [tf.compat.v1.get_variable(f"value_{index}", initializer=make) for index, make in enumerate(values)]
    loss = params.mean_loss(variables, features, labels)
    tf.compat.v1.losses.add_loss(loss)
    optimizer = params.optimizer()
    gradients = optimizer.compute_gradients(loss)
    by_rows = sum(isinstance(gradient, tf.IndexedSlices) for gradient, _ in gradients)
    if by_rows != params.num_tables:
        raise TypeError(f"expected {params.num_tables} gradients of rows alone, got {by_rows}: {gradients}")
    train_op = optimizer.apply_gradients(gradients, tf.compat.v1.train.get_global_step())
    return tf.estimator.EstimatorSpec(tf.estimator.ModeKeys.TRAIN, loss=loss, train_op=train_op)


def main(assignment: Assignment) -> None:
    """Be the task that TF_CONFIG names: a ps until it is killed, any other until the input ends."""
    config = tf.estimator.RunConfig(
        model_dir=assignment.folder,
        train_distribute=tf.compat.v1.distribute.experimental.ParameterServerStrategy(),
        session_config=tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=assignment.threads, inter_op_parallelism_threads=assignment.threads
        ),
        save_summary_steps=None,
        save_checkpoints_secs=None,
        log_step_count_steps=None,
    )
    model = MODELS[assignment.model]
    estimator = tf.estimator.Estimator(lambda features, labels: model_fn(features, labels, model), config=config)
    tf.estimator.train_and_evaluate(
        estimator, tf.estimator.TrainSpec(model.dataset, hooks=[Turnstile()]), tf.estimator.EvalSpec(model.dataset)
    )


if __name__ == "__main__":
    main(read_assignment())
