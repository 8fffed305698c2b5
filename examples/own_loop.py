"""A loop of one's own: the same script for one process, for one machine, or for a cluster.

python examples/own_loop.py --model-dir run                                    one process; once more, and it goes on
paramserver launch --ps 2 --workers 2 examples/own_loop.py --model-dir run     two ps, a chief and a worker
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramserver as ps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model-dir", default="run")
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train = TensorDataset(images[:1500], labels[:1500])

strategy = ps.ParameterServerStrategy()  # TF_CONFIG says who we are; without it, one process
strategy.restore(args.model_dir)  # prepare begins with the latest checkpoint, if there is one yet
with strategy.scope():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer: torch.optim.Optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    model, optimizer = strategy.prepare(model, optimizer)


def train_step(batch: list[torch.Tensor]) -> torch.Tensor:
    """One step on one batch: reduce over replicas, push, apply on the ps, pull."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    optimizer.step()
    return loss.detach()


batches = strategy.distribute_dataset(DataLoader(train, batch_size=32, shuffle=True))
for epoch in range(args.epochs):
    for batch in batches:
        loss = strategy.reduce("mean", strategy.run(train_step, args=(batch,)))
    print(f"epoch {epoch + 1}: loss {loss:.3f}, global step {strategy.global_step}")  # noqa: T201
    strategy.save(args.model_dir)  # the ps tasks write it for the chief, while other workers go on

strategy.wait_for_workers()  # the chief waits until the updates of all workers are in the model
if strategy.is_chief:
    path = strategy.save(args.model_dir)
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"saved {path}")  # noqa: T201
    print(f"test accuracy {accuracy:.3f}")  # noqa: T201
