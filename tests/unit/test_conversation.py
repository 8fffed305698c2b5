"""How many elements a request reads and writes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paramserver.arena import ArenaLayout, VariableSpec
from paramserver.conversation import elements
from paramserver.store.stored_arena import StoredArena
from paramserver.wire.messages import AwaitReady, GetStatus, Part, Proceed, Pull, Push

ARENAS = [
    StoredArena(
        ArenaLayout("float32", None, (VariableSpec("w", (size,), "float32"),)),
        torch.zeros(size),
        np.zeros(1, dtype=np.uint64),
    )
    for size in (10, 1000)
]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Pull(()), 0),
        (Pull((0, 1)), 1010),
        (Pull((7,)), 0),
        (Push(1, 0, True, (Part(1, "add"),), ()), 1000),
        (Push(1, 0, True, (Part(1, "add", ((0, 5), (7, 9))), Part(0, "add")), (0,)), 27),
        (AwaitReady(0.0), math.inf),
        (Proceed(0.0), math.inf),
        (GetStatus(), math.inf),
    ],
)
def test_elements_of_a_request(request_, expected):
    assert elements(request_, ARENAS) == expected
