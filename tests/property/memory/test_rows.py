"""Whatever rows are pushed, in whatever order, a table fares as a whole one under torch.optim with sparse gradients."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paramserver.distribute.bound.tables.lookup import Lookup
from paramserver.layout import blocks
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import num_blocks
from paramserver.layout.rules import RULES, describe_row_rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory import rows
from paramserver.memory.arena_memory import private_store_memory
from paramserver.store import arena as stored_arena
from paramserver.store import blocks as stored_blocks
from paramserver.store.tables import row_rule
from paramserver.store.tables.table import StoredTable

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    ("SparseAdam", {"lr": 0.1, "betas": (0.8, 0.9)}),
]


@st.composite
def pushes(draw: st.DrawFn) -> tuple[int, int, list[tuple[list[int], float]]]:
    """Rows, width, and of each step the ids, unsorted and with repetitions as a batch has them, and its lr."""
    count, width = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    steps = st.tuples(st.lists(st.integers(0, count - 1), max_size=12), st.sampled_from([0.1, 0.01]))
    return count, width, draw(st.lists(steps, max_size=6))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # once, by torch's own optimizers
@given(st.sampled_from(CASES), pushes(), st.integers(1, 12), st.booleans())
def test_any_sequence_of_rows_equals_torch(
    case: tuple[str, dict[str, Any]],
    pushed: tuple[int, int, list[tuple[list[int], float]]],
    block: int,
    is_large: bool,
) -> None:
    (name, kwargs), (count, width, steps) = case, pushed
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(count, width, generator=generator, dtype=torch.float64))
    optimizer = RULES[name].optimizer([whole], **kwargs)
    spec = VariableSpec("table", (count, width), "float64")
    layout = ArenaLayout("float64", describe_row_rule(optimizer, 0, "table"), (spec,), is_table=True)
    with mock.patch.multiple(blocks, BLOCK=block), mock.patch.multiple(row_rule, BLOCK=block), \
         mock.patch.multiple(stored_arena, BLOCK=block), mock.patch.multiple(stored_blocks, BLOCK=block), \
         mock.patch.multiple(rows, LARGE=0 if is_large else 1 << 62):  # fmt: skip
        memory = private_store_memory([layout])
        table = StoredTable(layout, memory.values[0], memory.versions[0])
        everything = torch.arange(count).numpy()
        table.apply_rows("assign", everything, whole.detach().clone(), None)
        for batch, lr in steps:
            optimizer.param_groups[0]["lr"] = lr
            gradient = torch.randn(len(batch), width, generator=generator, dtype=torch.float64)
            whole.grad = torch.sparse_coo_tensor(
                torch.tensor(batch, dtype=torch.int64)[None], gradient, whole.shape, check_invariants=False
            ).coalesce()
            optimizer.step()
            assert whole.grad is not None
            numbers = {**(layout.rule.settings if layout.rule else {}), "lr": lr}
            table.apply_rows("rule", whole.grad.indices()[0].numpy(), whole.grad.values().clone(), numbers)
            torch.testing.assert_close(table.read_rows(everything), whole.detach(), rtol=1e-12, atol=1e-12)
        assert len(memory.versions[0]) == num_blocks(count * width)
        assert not (memory.versions[0] % 2).any()


@given(st.lists(st.integers(0, 1 << 40) | st.integers(0, 9), max_size=60))
def test_any_batch_is_looked_up_alike_with_and_without_loops(batch: list[int]) -> None:
    ids = np.array(batch, dtype=np.int64)
    with mock.patch.multiple(rows, LARGE=0):
        loops = rows.loops_for(0, torch.float32)
    assert loops is not None
    assert all(map(np.array_equal, Lookup.of(ids, loops), Lookup.of(ids)))
