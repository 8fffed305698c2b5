"""Models that people bring, trained by two workers with two replicas each, on two ps tasks.

What comes out is compared, step by step, with a reference in plain PyTorch, which plays by these rules:

    * There is one *server* copy of the model, and plain optimizers of its parameters.
    * A worker has a copy for each replica; their values are those of the worker's last pull, so they may be stale.
    * A step of a worker: every replica computes gradients with its part of the batch. Their mean goes to the server,
      whose optimizer makes a step with the worker's settings (such as its learning rate). The worker pulls the values.
    * A floating point buffer of a worker becomes the mean of its replicas', an integer one the first replica's. What
      it has moved by since the last pull is added to the server's.
    * The staleness of a step is the number of the server's steps since the worker's last pull.

The workers take turns in a fixed order, on one thread, so that every run is the same.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.patience import patience
from torch import Tensor, nn, optim
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import paramserver as ps
from paramserver.testing.local_cluster import LocalCluster

TURNS = (0, 1, 1, 0, 0, 1)
REPLICAS = 2
BATCH = 8


# --- what is trained


@dataclass(frozen=True)
class Recipe:
    """How a person trains a model.

    Attributes:
        model: Makes it.
        optimizers: Makes its optimizers.
        batch: Makes a batch, by a generator.
        loss: The mean loss of a batch.
        before_step: What is done to a replica's gradients.
        schedule: Makes a learning-rate schedule for each optimizer.
        at_turn: Called before each turn with the turn and a worker's model.
        tolerance: For results that differ by their rounding.
    """

    model: Callable[[], nn.Module]
    optimizers: Callable[[Any], Sequence[optim.Optimizer]]
    batch: Callable[[torch.Generator], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    before_step: Callable[[nn.Module], object] = lambda _: None
    schedule: Callable[[optim.Optimizer], optim.lr_scheduler.LRScheduler] | None = None
    at_turn: Callable[[int, Any], object] = lambda *_: None
    tolerance: float = 1e-5

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(1)
        for _ in TURNS:
            yield self.batch(generator)

    def schedules(self, optimizers: Sequence[optim.Optimizer]) -> list[optim.lr_scheduler.LRScheduler]:
        return [self.schedule(optimizer) for optimizer in optimizers] if self.schedule else []

    def seed(self, turn: int, replica: int) -> None:
        """The random streams of dropout; without this they would be those of whatever ran before."""
        torch.manual_seed(turn * REPLICAS + replica)


def vectors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 6, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)


def sentences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    words = torch.randint(0, 20, (BATCH, 7), generator=generator)
    return words[:, :-1], words[:, 1:]


def classify(model: Any, features: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(features), labels)


def predict_next(model: Any, words: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(model(words).flatten(0, 1), following.flatten())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.around = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.body(features) + self.around(features))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False),
        nn.BatchNorm2d(4, momentum=None),  # a cumulative average, by the count of batches
        nn.ReLU(),
        Block(4, 4, 1),
        Block(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class Transformer(nn.Module):
    """An encoder whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(6, 16) * 0.1)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(16, 20)
        self.output.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        encoded = self.encoder(self.embedding(words) + self.positions, mask=self.mask, is_causal=True)
        return self.output(encoded)


class Recurrent(nn.Module):
    """A language model of two recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.recurrent = nn.LSTM(8, 12, num_layers=2, dropout=0.2, batch_first=True)
        self.output = nn.Linear(12, 20)

    def forward(self, words: Tensor) -> Tensor:
        return self.output(self.recurrent(self.embedding(words))[0])


class Frozen(nn.Module):
    """A body that nobody trains, a layer that is trained later, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()).requires_grad_(False)
        self.later = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.later(self.body(features)))


class Autoencoder(nn.Module):
    """Two halves, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.decoder = nn.Linear(4, 6)

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder(self.encoder(features))


def autocast(model: Any, features: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(model(features), labels)


RECIPES = {
    "mlp": Recipe(mlp, lambda m: [optim.Adam(m.parameters(), lr=0.01)], vectors, classify),
    "resnet": Recipe(
        resnet,
        lambda m: [optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)],
        images,
        classify,
    ),
    "transformer": Recipe(
        Transformer,
        # Attention does not depend on the bias of the keys: its gradient is rounding noise, which must not be blown up.
        lambda m: [optim.AdamW(m.parameters(), lr=0.01, eps=1e-4)],
        sentences,
        predict_next,
    ),
    "lstm": Recipe(Recurrent, lambda m: [optim.RMSprop(m.parameters(), lr=0.01)], sentences, predict_next),
    "frozen layers": Recipe(
        Frozen,
        lambda m: [optim.Adagrad([*m.later.parameters(), *m.head.parameters()], lr=0.1)],
        vectors,
        classify,
        at_turn=lambda turn, m: m.later.requires_grad_(turn >= 3),
    ),
    "several optimizers": Recipe(
        Autoencoder,
        lambda m: [optim.SGD(m.encoder.parameters(), lr=0.1), optim.Adam(m.decoder.parameters(), lr=0.01)],
        vectors,
        lambda model, features, _: F.mse_loss(model(features), features),
    ),
    "clipping and a schedule": Recipe(
        mlp,
        lambda m: [optim.AdamW(m.parameters(), lr=0.05)],
        vectors,
        classify,
        before_step=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05),
        schedule=lambda optimizer: optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6),
    ),
    "autocast": Recipe(mlp, lambda m: [optim.SGD(m.parameters(), lr=0.1, momentum=0.9)], vectors, autocast),
}


# --- how it is trained


class Worker:
    """A worker of a cluster, as a person writes it."""

    def __init__(self, recipe: Recipe, strategy: ps.ParameterServerStrategy) -> None:
        self._recipe = recipe
        self._strategy = strategy
        model = recipe.model()
        self.model, self._optimizers = strategy.prepare(model, recipe.optimizers(model))
        self._schedules = recipe.schedules(self._optimizers)

    @property
    def staleness(self) -> int:
        return self._optimizers[0].last_push.staleness

    def take_turn(self, turn: int, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss of the replicas."""
        self._recipe.at_turn(turn, self.model)
        parts = [ps.PerReplica(tensor.chunk(REPLICAS)) for tensor in batch]
        losses = self._strategy.local_results(self._strategy.run(self._train, [turn, *parts]))
        for schedule in self._schedules:
            schedule.step()
        return torch.stack(losses).mean()

    def _train(self, turn: int, *part: Tensor) -> Tensor:
        self._recipe.seed(turn, ps.get_replica_context().replica_id_in_sync_group)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss = self._recipe.loss(self.model, *part)
        loss.backward()
        self._recipe.before_step(self.model)
        for optimizer in self._optimizers:
            optimizer.step()
        return loss.detach()


class Reference:
    """See the top of the file."""

    def __init__(self, recipe: Recipe, num_workers: int) -> None:
        self._recipe = recipe
        self._server = recipe.model()
        self._optimizers = recipe.optimizers(self._server)
        self._steps = 0
        self.workers = [ReferenceWorker(recipe, self._server) for _ in range(num_workers)]

    def take_turn(self, turn: int, worker: ReferenceWorker, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss of the replicas."""
        losses = worker.compute(turn, batch)
        for name, parameter in self._server.named_parameters():
            parameter.grad = worker.gradient(name)
        for mine, theirs in zip(self._optimizers, worker.optimizers, strict=True):
            for group, settings in zip(mine.param_groups, theirs.param_groups, strict=True):
                group.update({name: value for name, value in settings.items() if name != "params"})
            mine.step()
        for name, buffer in self._server.named_buffers():
            buffer += worker.move(name)
        worker.staleness = self._steps - worker.pulled_at
        self._steps += 1
        worker.pull(self._server, self._steps)
        return torch.stack(losses).mean()


class ReferenceWorker:
    """A copy of the model for each replica, and one of what was pulled last."""

    def __init__(self, recipe: Recipe, server: nn.Module) -> None:
        self._recipe = recipe
        self._replicas = [copy.deepcopy(server) for _ in range(REPLICAS)]
        self.model = self._replicas[0]
        self.optimizers = recipe.optimizers(self.model)  # for their settings
        self._schedules = recipe.schedules(self.optimizers)
        self.staleness = 0
        self.pull(server, 0)

    def compute(self, turn: int, batch: tuple[Tensor, ...]) -> list[Tensor]:
        losses = []
        for index, (replica, *part) in enumerate(
            zip(self._replicas, *(tensor.chunk(REPLICAS) for tensor in batch), strict=True)
        ):
            self._recipe.at_turn(turn, replica)
            self._recipe.seed(turn, index)
            replica.zero_grad()
            losses.append(self._recipe.loss(replica, *part))
            losses[-1].backward()
            self._recipe.before_step(replica)
        return losses

    def gradient(self, name: str) -> Tensor | None:
        gradients = [replica.get_parameter(name).grad for replica in self._replicas]
        return None if gradients[0] is None else torch.stack(gradients).mean(0)

    def move(self, name: str) -> Tensor:
        buffers = [replica.get_buffer(name) for replica in self._replicas]
        value = torch.stack(buffers).mean(0) if buffers[0].is_floating_point() else buffers[0]
        pulled = self._pulled.get_buffer(name)
        return torch.where(value == pulled, 0, value - pulled)  # a mask may hold infinities

    def pull(self, server: nn.Module, at: int) -> None:
        self.pulled_at = at
        self._pulled = copy.deepcopy(server)
        for replica in self._replicas:
            replica.load_state_dict(server.state_dict())
        self.model.zero_grad()
        for optimizer, schedule in zip(self.optimizers, self._schedules, strict=False):
            if at:
                optimizer.step()  # changes nothing, without gradients
                schedule.step()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_trains_as_the_reference_does(recipe: Recipe, plain: Recipe) -> None:
    """Play all turns with both.

    Args:
        recipe: For the workers.
        plain: For the reference.
    """
    torch.manual_seed(0)
    reference = Reference(plain, num_workers=2)
    with LocalCluster(ps=2, workers=2) as cluster:
        torch.manual_seed(0)
        strategies = [strategy(cluster.resolver(task)) for task in cluster.tasks]
        workers = [Worker(recipe, each) for each in strategies]
        for turn, (index, batch) in enumerate(zip(TURNS, recipe.batches(), strict=True)):
            worker, expected = workers[index], reference.workers[index]
            loss = worker.take_turn(turn, batch)
            tolerance = {"rtol": recipe.tolerance, "atol": recipe.tolerance}
            torch.testing.assert_close(loss, reference.take_turn(turn, expected, batch), **tolerance)
            trained = getattr(worker.model, "_orig_mod", worker.model)  # what is inside of a compiled model
            torch.testing.assert_close(trained.state_dict(), expected.model.state_dict(), **tolerance)
            assert worker.staleness == expected.staleness
        assert strategies[TURNS[-1]].global_step == len(TURNS)
        for each in strategies:
            each.close()


def strategy(resolver: ps.ClusterResolver) -> ps.ParameterServerStrategy:
    devices = [f"cpu:{index}" for index in range(REPLICAS)]
    return ps.ParameterServerStrategy(resolver, compute_devices=devices, session_creation_timeout=patience(30))


@pytest.mark.parametrize("lane", ["auto", "tcp"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_two_workers_of_two_replicas(recipe: Recipe, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """W02, W03, W05."""
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    assert_trains_as_the_reference_does(recipe, recipe)


class Small(nn.Module):
    """What compiles quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(self.first(features).tanh())


def compiled_in_place() -> nn.Module:
    model = Small()
    model.compile()
    return model


def compiled_around() -> Any:
    return torch.compile(Small())


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # by torch's compiler
@pytest.mark.parametrize("make", [compiled_in_place, compiled_around])
def test_a_compiled_model(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exchanging the replicas' tensors compiles nothing anew. Takes about 10 seconds, most of them torch's imports."""
    counters.clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    recipe = Recipe(make, lambda m: [optim.SGD(m.parameters(), lr=0.1)], vectors, classify)
    # No processes beside this one, and no trials of what the compiler can do.
    with inductor.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}):
        assert_trains_as_the_reference_does(recipe, dataclasses.replace(recipe, model=Small))
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
