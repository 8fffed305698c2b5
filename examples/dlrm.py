"""DLRM, a recommender: large tables by Adagrad, the layers around them by Adam, in one Estimator.

Clicks are generated, so that it is known how well anybody can do: the accuracy of who knows the true odds. The rows of
the tables stay on the parameter servers; the larger tables are divided among two of them.

python examples/dlrm.py --model-dir run                                     one process
paramserver launch --ps 2 --workers 2 --evaluator examples/dlrm.py          a cluster
"""

import argparse
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

import paramserver as ps
from paramserver.estimator import Estimator, EstimatorSpec, EvalSpec, ModeKeys, RunConfig, TrainSpec, train_and_evaluate

TABLES = {"user": 500, "item": 200, "shop": 50, "hour": 24}
CLICKS, TEST_CLICKS, BATCH = 200_000, 20_000, 256
NUMBERS, TASTES = 4, 4

Features = dict[str, Tensor]


class World:
    """What makes people click: how a user's row, an item's and a shop's fit each other, the hour, and some numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows = {name: torch.randn(rows, TASTES, generator=generator) for name, rows in TABLES.items()}
        self._weights = torch.randn(NUMBERS, generator=generator)

    def clicks(self, count: int, seed: int) -> tuple[Features, Tensor, Tensor]:
        """Features, labels ``[count]``, and the true odds of each."""
        generator = torch.Generator().manual_seed(seed)
        ids = {name: torch.randint(rows, (count,), generator=generator) for name, rows in TABLES.items()}
        numbers = torch.randn(count, NUMBERS, generator=generator)
        user, item, shop, hour = (self._rows[name][ids[name]] for name in TABLES)
        logit = (user * item).sum(1) + (user * shop).sum(1) + 1.5 * hour[:, 0] + numbers @ self._weights
        odds = logit.sigmoid()
        labels = (torch.rand(count, generator=generator) < odds).float()
        return {**ids, "numbers": numbers}, labels, odds


class DLRM(nn.Module):
    """Tables for the categories, a perceptron for the numbers; a second one on how all of them fit each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, width, sparse=True) for name, rows in TABLES.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]  # an embedding's weight is a tensor
        self.bottom = nn.Sequential(nn.Linear(NUMBERS, 32), nn.ReLU(), nn.Linear(32, width))
        count = len(TABLES) + 1
        self.first, self.second = torch.triu_indices(count, count, offset=1)
        self.top = nn.Sequential(nn.Linear(count * width + len(self.first), 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, features: Features) -> Tensor:
        """The logit of each click, ``[batch]``."""
        rows = [table(features[name]) for name, table in self.tables.items()]
        vectors = torch.stack([self.bottom(features["numbers"]), *rows], 1)
        fits = (vectors @ vectors.transpose(1, 2))[:, self.first, self.second]
        logit: Tensor = self.top(torch.cat([vectors.flatten(1), fits], 1))[:, 0]
        return logit


def model_fn(mode: ModeKeys, params: Mapping[str, int]) -> EstimatorSpec:
    """What to train, and how: an optimizer for the tables and one for the layers."""
    model = DLRM(params["width"])
    layers = [*model.bottom.parameters(), *model.top.parameters()]
    dense = torch.optim.Adam(layers, lr=0.003)
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: F.binary_cross_entropy_with_logits(model(features), labels),
        predict_fn=lambda model, features: model(features).sigmoid(),
        optimizer={"dense": dense, "tables": torch.optim.Adagrad(model.tables.parameters(), lr=0.3)},
        scheduler=torch.optim.lr_scheduler.LinearLR(dense, 0.1, total_iters=100),
        eval_metrics={"test": MetricCollection({"accuracy": BinaryAccuracy(), "auc": BinaryAUROC()})},
    )


def batches_of(features: Features, labels: Tensor, *, shuffle: bool) -> Iterator[tuple[Features, Tensor]]:
    """One pass over some clicks."""
    order = torch.randperm(len(labels)) if shuffle else torch.arange(len(labels))
    for rows in torch.split(order, BATCH):
        yield {name: each[rows] for name, each in features.items()}, labels[rows]


def main() -> None:
    """Train, and compare with the best that can be done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", default="run")
    parser.add_argument("--max-steps", type=int, default=2000)
    args = parser.parse_args()

    world = World()
    features, labels, _ = world.clicks(CLICKS, seed=1)
    test_features, test_labels, odds = world.clicks(TEST_CLICKS, seed=2)
    best = ((odds > 0.5) == test_labels.bool()).float().mean()

    def train_input() -> Iterator[tuple[Features, Tensor]]:
        while True:  # training stops at max_steps
            yield from batches_of(features, labels, shuffle=True)

    strategy = ps.ParameterServerStrategy(variable_partitioner=ps.placement.MinSize(2048, max_shards=2))
    config = RunConfig(model_dir=args.model_dir, save_checkpoints_secs=5, train_distribute=strategy)
    results = train_and_evaluate(
        Estimator(model_fn, params={"width": 8}, config=config),
        TrainSpec(train_input, max_steps=args.max_steps),
        EvalSpec(
            lambda: batches_of(test_features, test_labels, shuffle=False),
            steps=None,
            start_delay_secs=0,
            throttle_secs=5,
        ),
    )
    if results:
        accuracy = results[0]["test"]["accuracy"]
        print(f"test accuracy {accuracy:.4f}; who knows the odds has {best:.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
