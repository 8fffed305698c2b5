"""The demo's program, run by its chief, worker and evaluator: a classifier of handwritten digits.

The data are the 1,797 images of 8 x 8 pixels that come with scikit-learn, in a fixed split.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # the usual name
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import paramserver as ps

TEST_IMAGES = 297
BATCH_SIZE = 32
CLASSES = 10
CHECKPOINTS = 10


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images, the same in every process."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, test = random_split(data, [len(data) - TEST_IMAGES, TEST_IMAGES], torch.Generator().manual_seed(0))
    return TensorDataset(*data[train.indices]), TensorDataset(*data[test.indices])


def train_input() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, in an order of this worker's own."""
    loader = DataLoader(datasets()[0], batch_size=BATCH_SIZE, shuffle=True)
    while True:
        yield from loader


def eval_input() -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader that yields every test image once."""
    return DataLoader(datasets()[1], batch_size=TEST_IMAGES)


def model_fn(mode: str) -> ps.estimator.EstimatorSpec:
    """Build a perceptron with one hidden layer."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return ps.estimator.EstimatorSpec(
        ps.estimator.ModeKeys(mode),
        model=model,
        loss_fn=lambda model, features, labels: F.cross_entropy(model(features), labels),
        optimizer=torch.optim.Adagrad(model.parameters(), lr=0.05),
        eval_metrics={"accuracy": MulticlassAccuracy(CLASSES, average="micro")},
    )


def main(model_dir: str, max_steps: int) -> None:
    """Do this task's part of the run."""
    config = ps.estimator.RunConfig(
        model_dir=model_dir,
        seed=1,
        save_checkpoints_steps=max(max_steps // CHECKPOINTS, 1),
        train_distribute=ps.ParameterServerStrategy(),
    )
    exporter = ps.estimator.FinalExporter("final")
    ps.estimator.train_and_evaluate(
        ps.estimator.Estimator(model_fn, config=config),
        ps.estimator.TrainSpec(train_input, max_steps=max_steps),
        ps.estimator.EvalSpec(eval_input, start_delay_secs=0, throttle_secs=0.2, exporters=exporter),
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
