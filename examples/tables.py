"""Tables: ratings of films by users, from embeddings whose rows stay on the parameter servers.

python examples/tables.py                                            one process
paramserver launch --ps 2 --workers 2 examples/tables.py             two ps, each with half of each table
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramserver as ps

USERS, FILMS, TASTES, NOISE = 10_000, 1_000, 4, 0.25

generator = torch.Generator().manual_seed(0)
taste = torch.randn(USERS, TASTES, generator=generator)
style = torch.randn(FILMS, TASTES, generator=generator) / TASTES**0.5
users = torch.randint(USERS, (600_000,), generator=generator)
films = torch.randint(FILMS, users.shape, generator=generator)
ratings = (taste[users] * style[films]).sum(1) + NOISE * torch.randn(users.shape, generator=generator)
batches = TensorDataset(*(each[:-10_000].view(-1, 1000) for each in (users, films, ratings)))


class Ratings(nn.Module):
    """A rating is how well a user's row and a film's row fit each other."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(USERS, TASTES, sparse=True)
        self.films = nn.Embedding(FILMS, TASTES, sparse=True)

    def forward(self, users: torch.Tensor, films: torch.Tensor) -> torch.Tensor:
        """The ratings ``[batch]``."""
        return torch.einsum("bt,bt->b", self.users(users), self.films(films))


strategy = ps.ParameterServerStrategy(variable_partitioner=ps.placement.FixedShards(2))
with strategy.scope():
    model = Ratings()
    optimizer: torch.optim.Optimizer = torch.optim.Adagrad(model.parameters(), lr=0.5)
    model, optimizer = strategy.prepare(model, optimizer)

for epoch in range(3):
    for who, what, rating in strategy.distribute_dataset(DataLoader(batches, batch_size=None, shuffle=True)):
        optimizer.zero_grad()
        loss = F.mse_loss(model(who, what), rating, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    print(f"epoch {epoch + 1}: error {(loss / len(rating)) ** 0.5:.3f}, global step {strategy.global_step}")  # noqa: T201

with torch.no_grad():
    error = F.mse_loss(model(users[-10_000:], films[-10_000:]), ratings[-10_000:]) ** 0.5
print(f"test error {error:.3f}, of noise alone {NOISE:.3f}")  # noqa: T201
