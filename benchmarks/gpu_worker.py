"""``python -m benchmarks.gpu_worker WORK``: a process that trains on one GPU, each step to its end.

It trains with parameter servers as the task that TF_CONFIG names, or with plain PyTorch where there is none.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

import paramserver as ps
from benchmarks.models import Batch, Mlp, Model, Sparse, Training
from benchmarks.participant import take_part
from benchmarks.shapes import BATCHES, SPARSES, MlpShape, SparseShape

START_LIMIT = 120.0


class Work(msgspec.Struct, kw_only=True, frozen=True):
    """What is trained: one of `MODELS`, or of `TINY` ones, on a device."""

    model: str
    device: str
    is_tiny: bool = False


class Sentences(nn.Module):
    """A causal language model: embedding, transformer layers, and a linear layer to the words."""

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.words = nn.Linear(width, words)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits ``[batch, words, length]`` of ``ids [batch, length]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        logits: Tensor = self.words(self.layers(self.embedding(ids), mask=mask, is_causal=True))
        return logits.transpose(1, 2)


@dataclass(frozen=True)
class Transformer:
    """A small transformer; its batches are ``ids [batch, length], next ids [batch, length]``."""

    words: int
    width: int
    layers: int
    length: int
    batch: int

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return sum(parameter.nbytes for parameter in self.build().parameters())

    def build(self) -> nn.Module:
        """The module, with the same initial values every time."""
        torch.manual_seed(0)
        return Sentences(self.words, self.width, self.layers)

    def batches(self) -> list[Batch]:
        """Random batches, the same every time."""
        generator = torch.Generator().manual_seed(1)
        shape = (BATCHES, self.batch, self.length + 1)
        return [(ids[:, :-1], ids[:, 1:]) for ids in torch.randint(self.words, shape, generator=generator)]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(module.parameters(), lr=1e-4)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy."""
        return functional.cross_entropy(outputs, labels)


MODELS: dict[str, Model] = {
    "MLP of 100 M parameters": Mlp(MlpShape(sizes=(1024, 8192, 8192, 3072), batch=512)),
    "transformer of 27 M parameters": Transformer(words=8192, width=512, layers=6, length=128, batch=32),
    "sparse": Sparse(SPARSES["sparse"]),
}
TINY: dict[str, Model] = {
    "MLP of 100 M parameters": Mlp(MlpShape(sizes=(8, 8, 2), batch=4)),
    "transformer of 27 M parameters": Transformer(words=16, width=16, layers=1, length=4, batch=2),
    "sparse": Sparse(
        SparseShape(rows=20, width=2, ids=3, numbers=2, hidden=(4,), batch=4, learning_rate=0.01)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class OnDevice:
    """A model whose module and batches are on a device, where a user of one would have put them."""

    model: Model
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return self.model.nbytes

    def build(self) -> nn.Module:
        """The module."""
        return self.model.build().to(self.device)

    def batches(self) -> list[Batch]:
        """The batches."""
        return [tuple(tensor.to(self.device) for tensor in batch) for batch in self.model.batches()]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The model's own."""
        return self.model.optimizer(module)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The model's own."""
        return self.model.loss(outputs, labels)


def main(work: Work, is_distributed: bool) -> None:
    """Train until the input ends."""
    device = torch.device(work.device)
    model = OnDevice((TINY if work.is_tiny else MODELS)[work.model], device)
    module = model.build()
    optimizer = model.optimizer(module)
    if is_distributed:
        strategy = ps.ParameterServerStrategy(compute_devices=[work.device], session_creation_timeout=START_LIMIT)
        with strategy.scope():
            module, optimizer = strategy.prepare(module, optimizer)
    training = Training(model, module, optimizer)

    def step() -> int:
        training.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 0

    take_part(step, lambda: training.loss, lambda: 0)
    if is_distributed:
        strategy.close()


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Work), "TF_CONFIG" in os.environ)
