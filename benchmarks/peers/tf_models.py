"""The models of `benchmarks.models.shapes` in TensorFlow, of either version."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]  # installed for these peers only

from benchmarks.models.shapes import BATCHES, MLPS, SPARSES, MlpShape, SparseShape


class TfModel(Protocol):
    """What is trained, and how."""

    @property
    def num_tables(self) -> int:
        """Number of variables that have a gradient of the looked-up rows alone."""

    def dataset(self) -> Any:
        """Return a ``tf.data.Dataset`` of random ``(features, labels)``, repeated without end."""

    def initial_values(self) -> list[Any]:
        """Return functions that make the variables' values, in the order of the variables in `mean_loss`."""

    def mean_loss(self, variables: list[Any], features: Any, labels: Any) -> Any:
        """Return the loss of a batch, its mean."""

    def optimizer(self) -> Any:
        """Return a new optimizer."""


@dataclass(frozen=True)
class TfMlp:
    """A `MlpShape` in TensorFlow; its batches are ``features [batch, inputs], labels [batch]``."""

    shape: MlpShape
    num_tables: int = 0

    def dataset(self) -> Any:
        generator = np.random.default_rng(1)
        shape = (BATCHES, self.shape.batch)
        features = generator.standard_normal((*shape, self.shape.sizes[0]), np.float32)
        labels = generator.integers(self.shape.sizes[-1], size=shape)
        return tf.data.Dataset.from_tensor_slices((features, labels)).repeat()

    def initial_values(self) -> list[Any]:
        return layer_values(self.shape.sizes)

    def mean_loss(self, variables: list[Any], features: Any, labels: Any) -> Any:
        logits = apply_layers(variables, features)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))

    def optimizer(self) -> Any:
        return tf.compat.v1.train.GradientDescentOptimizer(self.shape.learning_rate)


@dataclass(frozen=True)
class TfSparse:
    """A `SparseShape` in TensorFlow.

    Its batches are ``(ids [batch, ids], numbers [batch, numbers]), labels [batch]``.
    """

    shape: SparseShape
    num_tables: int = 1

    def dataset(self) -> Any:
        generator = np.random.default_rng(1)
        shape = (BATCHES, self.shape.batch)
        ids = generator.integers(self.shape.rows, size=(*shape, self.shape.ids))
        numbers = generator.standard_normal((*shape, self.shape.numbers), np.float32)
        labels = generator.integers(2, size=shape).astype(np.float32)
        return tf.data.Dataset.from_tensor_slices(((ids, numbers), labels)).repeat()

    def initial_values(self) -> list[Any]:
        table = (self.shape.rows, self.shape.width)
        return [lambda: tf.random.normal(table, seed=0), *layer_values(self.shape.sizes)]

    def mean_loss(self, variables: list[Any], features: Any, labels: Any) -> Any:
        (ids, numbers), (table, *layers) = features, variables
        rows = tf.reshape(tf.nn.embedding_lookup(table, ids), (-1, self.shape.ids * self.shape.width))
        logits = tf.squeeze(apply_layers(layers, tf.concat((rows, numbers), axis=1)), axis=1)
        return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))

    def optimizer(self) -> Any:
        return tf.compat.v1.train.AdagradOptimizer(self.shape.learning_rate)


MODELS: dict[str, TfModel] = {
    **{name: TfMlp(shape) for name, shape in MLPS.items()},
    **{name: TfSparse(shape) for name, shape in SPARSES.items()},
}


def layer_values(sizes: tuple[int, ...]) -> list[Any]:
    """Return functions that make each layer's weight ``[inputs, outputs]`` and bias ``[outputs]``, in turns."""
    values = []
    for inputs, outputs in itertools.pairwise(sizes):
        bound = 1 / math.sqrt(inputs)
        for shape in ((inputs, outputs), (outputs,)):
            values.append(lambda shape=shape, bound=bound: tf.random.uniform(shape, -bound, bound, seed=0))
    return values


def apply_layers(variables: list[Any], features: Any) -> Any:
    """Return the outputs ``[batch, outputs]`` of layers with these values for ``features [batch, inputs]``."""
    *hidden, (weight, bias) = zip(variables[::2], variables[1::2], strict=True)
    for its_weight, its_bias in hidden:
        features = tf.nn.relu(tf.matmul(features, its_weight) + its_bias)
    return tf.matmul(features, weight) + bias
