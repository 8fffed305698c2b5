"""Wide and deep on a table, as on the census data: vocabulary, hashed and crossed columns beside numeric ones.

The table is generated, so that it is known how well anybody can do on it: the accuracy of who knows the true odds.

python examples/wide_and_deep.py --model-dir run                                     one process
paramserver launch --ps 2 --workers 2 --evaluator examples/wide_and_deep.py          a cluster
"""

import argparse
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

import paramserver as ps
from paramserver.estimator import Estimator, EstimatorSpec, EvalSpec, ModeKeys, RunConfig, TrainSpec, train_and_evaluate

ROWS, TEST_ROWS, BATCH = 40_000, 20_000, 128
EDUCATIONS = ["none", "school", "some college", "bachelor", "master", "doctorate"]
OCCUPATIONS = [f"occupation {number}" for number in range(30)]
OCCUPATION_BUCKETS, CROSS_BUCKETS = 128, 1024

Table = dict[str, np.ndarray]


def make_table(rows: int, seed: int) -> tuple[Table, np.ndarray, np.ndarray]:
    """Columns, labels, and the true odds of each row."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    of_education = np.linspace(-1.5, 1.5, len(EDUCATIONS))
    of_occupation = world.normal(0, 1, len(OCCUPATIONS))
    of_both = world.normal(0, 1.5, (len(EDUCATIONS), len(OCCUPATIONS)))
    education = rng.integers(len(EDUCATIONS), size=rows)
    occupation = rng.integers(len(OCCUPATIONS), size=rows)
    age, hours = rng.uniform(18, 80, rows), rng.normal(40, 10, rows)
    prime = -(((age - 48) / 16) ** 2) + 1  # not linear: the deep part's to find
    logit = of_education[education] + of_occupation[occupation] + of_both[education, occupation]
    logit += 1.5 * prime + 0.05 * (hours - 40)
    odds = 1 / (1 + np.exp(-logit))
    labels = rng.random(rows) < odds
    columns = {
        "education": np.array(EDUCATIONS)[education],
        "occupation": np.array(OCCUPATIONS)[occupation],
        "age": age,
        "hours": hours,
    }
    return columns, labels, odds


def bucket(text: str, buckets: int) -> int:
    """The same for the same text, in every process."""
    return zlib.crc32(text.encode()) % buckets


def features_of(table: Table) -> list[Tensor]:
    """A vocabulary column, a hashed column, a crossed column, and two numeric ones ``[rows, 2]``."""
    education = torch.tensor([EDUCATIONS.index(text) for text in table["education"]])
    occupation = torch.tensor([bucket(text, OCCUPATION_BUCKETS) for text in table["occupation"]])
    pairs = zip(table["education"], table["occupation"], strict=True)
    crossed = torch.tensor([bucket(f"{one} x {other}", CROSS_BUCKETS) for one, other in pairs])
    numeric = np.stack([(table["age"] - 49) / 18, (table["hours"] - 40) / 10], 1)
    return [education, occupation, crossed, torch.tensor(numeric, dtype=torch.float32)]


class WideAndDeep(nn.Module):
    """A linear model of sparse columns beside a perceptron over embeddings and numbers; their logits add up."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.wide = nn.ModuleList(
            nn.Embedding(buckets, 1) for buckets in (len(EDUCATIONS), OCCUPATION_BUCKETS, CROSS_BUCKETS)
        )
        for column in self.wide:
            nn.init.zeros_(column.weight)  # type: ignore[arg-type]  # an embedding's weight is a tensor
        self.deep_education = nn.Embedding(len(EDUCATIONS), 4)
        self.deep_occupation = nn.Embedding(OCCUPATION_BUCKETS, 8)
        self.deep = nn.Sequential(nn.Linear(4 + 8 + 2, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """The logit of each row, ``[rows]``."""
        education, occupation, crossed, numeric = features
        columns = zip(self.wide, (education, occupation, crossed), strict=True)
        wide = sum(column(values)[:, 0] for column, values in columns)
        joined = torch.cat([self.deep_education(education), self.deep_occupation(occupation), numeric], 1)
        logit: Tensor = wide + self.deep(joined)[:, 0]
        return logit


def model_fn(mode: ModeKeys, params: Mapping[str, int]) -> EstimatorSpec:
    """What to train, and how."""
    model = WideAndDeep(params["hidden"])
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: F.binary_cross_entropy_with_logits(model(features), labels),
        predict_fn=lambda model, features: model(features).sigmoid(),
        optimizer=torch.optim.Adagrad(model.parameters(), lr=0.05),
        eval_metrics={"accuracy": BinaryAccuracy()},
    )


def data_of(rows: int, seed: int) -> tuple[TensorDataset, float]:
    """A generated table as a dataset, and the accuracy of who knows the odds of its rows."""
    table, labels, odds = make_table(rows, seed)
    best = float(np.where(odds > 0.5, labels, ~labels).mean())
    return TensorDataset(*features_of(table), torch.tensor(labels, dtype=torch.float32)), best


def batches_of(data: TensorDataset, *, shuffle: bool) -> Iterator[tuple[list[Tensor], Tensor]]:
    """One pass over a table."""
    for *features, labels in DataLoader(data, batch_size=BATCH, shuffle=shuffle):
        yield features, labels


def main() -> None:
    """Train, and compare with the best that can be done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", default="run")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    train, _ = data_of(ROWS, seed=1)
    test, best = data_of(TEST_ROWS, seed=2)

    def train_input() -> Iterator[tuple[list[Tensor], Tensor]]:
        while True:  # training stops at max_steps
            yield from batches_of(train, shuffle=True)

    config = RunConfig(model_dir=args.model_dir, save_checkpoints_secs=5, train_distribute=ps.ParameterServerStrategy())
    results = train_and_evaluate(
        Estimator(model_fn, params={"hidden": 32}, config=config),
        TrainSpec(train_input, max_steps=args.epochs * ROWS // BATCH),
        EvalSpec(lambda: batches_of(test, shuffle=False), steps=None, start_delay_secs=0, throttle_secs=5),
    )
    if results:
        accuracy = results[0]["accuracy"]
        print(f"test accuracy {accuracy:.4f}; who knows the odds has {best:.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
