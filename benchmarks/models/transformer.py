"""A small causal language model."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.model import Batch
from benchmarks.models.shapes import BATCHES


class Sentences(nn.Module):
    """The module: an embedding, transformer layers, and a linear layer to the words."""

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.words = nn.Linear(width, words)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits ``[batch, words, length]`` of ``ids [batch, length]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        logits: Tensor = self.words(self.layers(self.embedding(ids), mask=mask, is_causal=True))
        return logits.transpose(1, 2)


class Transformer(msgspec.Struct, kw_only=True, frozen=True, tag=True):
    """A small transformer; its batches are ``ids [batch, length], next ids [batch, length]``."""

    words: int
    width: int
    layers: int
    length: int
    batch: int

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.build().parameters())

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return Sentences(self.words, self.width, self.layers)

    def batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        shape = (BATCHES, self.batch, self.length + 1)
        return [(ids[:, :-1], ids[:, 1:]) for ids in torch.randint(self.words, shape, generator=generator)]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=1e-4)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels)
