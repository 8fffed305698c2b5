"""The Estimator: one script for every role, on one machine or many.

python examples/estimator.py                                                   one process
paramserver launch --ps 2 --workers 2 --evaluator examples/estimator.py        five processes
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # as everybody calls it
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import paramserver as ps

parser = argparse.ArgumentParser()
parser.add_argument("--model-dir", default="run")
parser.add_argument("--max-steps", type=int, default=2000)
args = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
train, test = torch.utils.data.random_split(data, [1500, 297], torch.Generator().manual_seed(0))


def train_input() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: training stops at max_steps."""
    while True:
        yield from DataLoader(train, batch_size=32, shuffle=True)


def eval_input() -> DataLoader[tuple[Tensor, ...]]:
    """Every test image once."""
    return DataLoader(test, batch_size=99)


def model_fn(mode: ps.estimator.ModeKeys, params: dict[str, float]) -> ps.estimator.EstimatorSpec:
    """Build the model once; name what to call for each step."""
    model = nn.Sequential(nn.Linear(64, int(params["hidden"])), nn.ReLU(), nn.Linear(int(params["hidden"]), 10))
    return ps.estimator.EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: F.cross_entropy(model(features), labels),
        optimizer=torch.optim.Adagrad(model.parameters(), lr=params["lr"]),
        eval_metrics={"accuracy": MulticlassAccuracy(10)},
    )


strategy = ps.ParameterServerStrategy()
config = ps.estimator.RunConfig(model_dir=args.model_dir, save_checkpoints_steps=500, train_distribute=strategy)
estimator = ps.estimator.Estimator(model_fn, params={"hidden": 128, "lr": 0.05}, config=config)
final = ps.estimator.FinalExporter("final")
results = ps.estimator.train_and_evaluate(
    estimator,
    ps.estimator.TrainSpec(train_input, max_steps=args.max_steps),
    ps.estimator.EvalSpec(eval_input, start_delay_secs=0, throttle_secs=1, exporters=final),
)
if results:
    print(f"test accuracy {results[0]['accuracy']:.3f} at step {results[0]['global_step']}")  # noqa: T201
