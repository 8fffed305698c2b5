"""The models of `benchmarks.models` in TensorFlow, of either version."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]  # installed for this peer only

from benchmarks.peers.assignment import Assignment


def dataset(assignment: Assignment) -> Any:
    """Random ``(features [batch, inputs], labels [batch])``, over and over; a ``tf.data.Dataset``."""
    generator = np.random.default_rng(1)
    shape = (assignment.batches, assignment.batch)
    features = generator.standard_normal((*shape, assignment.sizes[0]), np.float32)
    labels = generator.integers(assignment.sizes[-1], size=shape)
    return tf.data.Dataset.from_tensor_slices((features, labels)).repeat()


def initial_values(assignment: Assignment) -> list[Any]:
    """Functions that make the values of each layer's weight ``[inputs, outputs]`` and bias ``[outputs]``, in turns."""
    values = []
    for inputs, outputs in itertools.pairwise(assignment.sizes):
        bound = 1 / math.sqrt(inputs)
        for shape in ((inputs, outputs), (outputs,)):
            values.append(lambda shape=shape, bound=bound: tf.random.uniform(shape, -bound, bound, seed=0))
    return values


def mean_loss(variables: list[Any], features: Any, labels: Any) -> Any:
    """The cross entropy of a batch with the labels, its mean."""
    *hidden, (weight, bias) = zip(variables[::2], variables[1::2], strict=True)
    for its_weight, its_bias in hidden:
        features = tf.nn.relu(tf.matmul(features, its_weight) + its_bias)
    logits = tf.matmul(features, weight) + bias
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
