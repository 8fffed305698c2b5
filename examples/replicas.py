"""Two replicas in one process, on two logical devices: what a worker with two GPUs does, without a GPU.

python examples/replicas.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramserver as ps

EPOCHS = 10

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train = TensorDataset(images[:1500], labels[:1500])

strategy = ps.CentralStorageStrategy(compute_devices=["cpu:0", "cpu:1"])
with strategy.scope():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer: torch.optim.Optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    model, optimizer = strategy.prepare(model, optimizer)
    seen = ps.Variable(0, name="seen", aggregation=ps.VariableAggregation.SUM)


def train_step(batch: list[torch.Tensor]) -> torch.Tensor:
    """One step of one replica, on its half of the batch."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    optimizer.step()  # waits for the other replica: their gradients become one update
    seen.assign_add(len(batch[0]))  # their sum
    return loss.detach()


batches = strategy.distribute_dataset(DataLoader(train, batch_size=32, shuffle=True))
for epoch in range(EPOCHS):
    for batch in batches:
        losses = strategy.run(train_step, args=(batch,))
    loss = strategy.reduce("mean", losses)
    print(f"epoch {epoch + 1}: loss {loss:.3f}, global step {strategy.global_step}, {int(seen)} images seen")  # noqa: T201

with torch.no_grad():
    accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
print(f"test accuracy {accuracy:.3f}")  # noqa: T201
