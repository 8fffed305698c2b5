"""The shapes of the models that are measured, as numbers alone.

This module imports no training library, so that programs of other libraries train the same models.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

BATCHES = 16
"""Number of batches that a model is trained on, over and over."""

LEARNING_RATE = 0.01
"""The learning rate of dense models."""

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class MlpShape:
    """A multilayer perceptron with ReLU between its layers, a class for each output.

    Attributes:
        sizes: Features of the input, of each hidden layer, and of the output.
        batch: Examples in a batch.
        learning_rate: Learning rate of SGD.
    """

    sizes: tuple[int, ...]
    batch: int = 32
    learning_rate: float = LEARNING_RATE

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, float32."""
        return dense_nbytes(self.sizes)


@dataclass(frozen=True, kw_only=True)
class SparseShape:
    """Rows of one embedding table, concatenated with some numbers, and a multilayer perceptron with one logit on top.

    Attributes:
        rows: Rows of the table.
        width: Elements of a row.
        ids: Rows that an example looks up.
        numbers: Further features of an example.
        hidden: Features of each hidden layer.
        batch: Examples in a batch.
        learning_rate: Learning rate of Adagrad.
    """

    rows: int
    width: int
    ids: int
    numbers: int
    hidden: tuple[int, ...]
    batch: int
    learning_rate: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features of the perceptron's input, of each hidden layer, and of the logit."""
        return (self.ids * self.width + self.numbers, *self.hidden, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, the table's included, float32."""
        return 4 * self.rows * self.width + dense_nbytes(self.sizes)


def dense_nbytes(sizes: tuple[int, ...]) -> int:
    """Return the bytes of the weights and biases of layers between so many features, float32."""
    return 4 * sum(inputs * outputs + outputs for inputs, outputs in itertools.pairwise(sizes))


MLPS = {
    "small": MlpShape(sizes=(784, 128, CLASSES)),
    "large": MlpShape(sizes=(784, 4096, 4096, 4096, CLASSES)),
}

SPARSES = {
    "sparse": SparseShape(
        rows=2_000_000, width=16, ids=26, numbers=13, hidden=(256, 128), batch=1024, learning_rate=0.05
    ),
}
