"""Arenas on ps tasks that are measured without a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.models.shapes import LEARNING_RATE
from paramserver.client.client import ParameterClient
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import describe
from paramserver.layout.variables import VariableSpec
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part


def sgd_arena(name: str, nbytes: int) -> ArenaLayout:
    """Return the layout of an arena that holds one variable, which SGD updates."""
    rule = describe(torch.optim.SGD([torch.zeros(1)], lr=LEARNING_RATE), 0)
    return ArenaLayout("float32", rule, (VariableSpec(name, (nbytes // 4,), "float32"),))


def create_arenas(chief: ParameterClient, layouts: Sequence[Sequence[ArenaLayout]]) -> list[WorkerMemory]:
    """Create the arenas of each ps with random values, and return the memory of the client that did."""
    chief.create(layouts)
    memories = chief.open()
    for memory in memories:
        for gradients in memory.gradients:
            gradients.uniform_()
    numbers = [range(len(arenas)) for arenas in layouts]
    chief.push_pull(chief.plan([[Part(arena, "assign") for arena in each] for each in numbers], numbers), counts=False)
    chief.mark_ready(0)
    return memories
