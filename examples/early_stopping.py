"""Digits until they are no longer learnt better: the best model is exported, and training stops early.

python examples/early_stopping.py --model-dir run                                    one process
paramserver launch --ps 2 --workers 2 --evaluator examples/early_stopping.py         a cluster
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import paramserver as ps
from paramserver.estimator import (
    BestExporter,
    Estimator,
    EstimatorSpec,
    EvalSpec,
    ModeKeys,
    RunConfig,
    TrainSpec,
    stop_if_no_increase_hook,
    train_and_evaluate,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model-dir", default="run")
parser.add_argument("--patience", type=int, default=1000, help="steps without a better accuracy")
args = parser.parse_args()

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
train, test = torch.utils.data.random_split(data, [1500, 297], torch.Generator().manual_seed(0))


def train_input() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end."""
    while True:
        yield from DataLoader(train, batch_size=32, shuffle=True)


def eval_input() -> DataLoader[tuple[Tensor, ...]]:
    """Every test image once."""
    return DataLoader(test, batch_size=99)


def is_more_accurate(best_eval_result: dict[str, float], current_eval_result: dict[str, float]) -> bool:
    """What the best model is the best by."""
    return current_eval_result["accuracy"] > best_eval_result["accuracy"]


def model_fn(mode: ModeKeys) -> EstimatorSpec:
    """A perceptron."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: F.cross_entropy(model(features), labels),
        optimizer=torch.optim.Adagrad(model.parameters(), lr=0.05),
        eval_metrics={"accuracy": MulticlassAccuracy(10)},
    )


strategy = ps.ParameterServerStrategy()
config = RunConfig(model_dir=args.model_dir, save_checkpoints_steps=200, train_distribute=strategy)
estimator = Estimator(model_fn, config=config)
best = BestExporter("best", lambda: torch.zeros(2, 64), compare_fn=is_more_accurate, exports_to_keep=1)
stop = stop_if_no_increase_hook(
    estimator, "accuracy", max_steps_without_increase=args.patience, run_every_secs=None, run_every_steps=200
)
results = train_and_evaluate(
    estimator,
    TrainSpec(train_input, max_steps=100_000, hooks=[stop]),
    EvalSpec(eval_input, steps=None, start_delay_secs=0, throttle_secs=0, exporters=best),
)
if results:
    print(f"test accuracy {results[0]['accuracy']:.3f} at step {results[0]['global_step']}")  # noqa: T201
