"""Row rules equal torch.optim with sparse gradients on the whole table, step by step; slots go out and in by blocks.

They do with torch's own step on the rows, and with a loop that is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from paramserver.errors import ConfigError, UnsupportedOptimizerError
from paramserver.layout.rules import RULES, Rule, describe_row_rule
from paramserver.memory import rows
from paramserver.store.tables import row_rule
from paramserver.store.tables.row_rule import RowRule

# What torch says, once in a process, of the sparse tensors that its own optimizers make.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

# To test a new rule, add a row.
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.2, "eps": 1e-3}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.3}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "maximize": True}),
    ("SparseAdam", {"lr": 0.05}),
    ("SparseAdam", {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3}),
    ("SparseAdam", {"lr": 0.05, "maximize": True}),
]
every_row = pytest.mark.parametrize(
    ("name", "kwargs"), ROWS, ids=[f"{name}-{'-'.join(map(str, kwargs))}" for name, kwargs in ROWS]
)

# Those of a large table that a loop computes, bit by bit as torch does on the rows.
LOOPS = [kwargs for kwargs in ROWS if kwargs[0] != "SparseAdam" and not kwargs[1].get("maximize")]

COUNT, WIDTH = 11, 3
STEPS = 8
SLOTS = {"SGD": set(), "Adagrad": {"sum", "step"}, "SparseAdam": {"exp_avg", "exp_avg_sq", "step"}}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # torch's fused kernels round differently


@pytest.fixture(autouse=True, params=["torch", "loops"])
def size_of_tables(request, monkeypatch):
    """Whether a table counts as large."""
    monkeypatch.setattr(rows, "LARGE", 0 if request.param == "loops" else 1 << 62)


class Tables:
    """The same table under torch.optim, whole, and under a rule."""

    def __init__(self, name: str, kwargs: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.whole = nn.Parameter(torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64).to(dtype))
        self.optimizer = RULES[name].optimizer([self.whole], **kwargs)
        self.described = describe_row_rule(self.optimizer, 0, "table")
        self.values = self.whole.detach().clone()
        self.rule = RowRule(self.described, self.values)

    def step(self, seed: int, lr: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(COUNT, generator=generator)[: 1 + seed % 5].sort().values
        gradient = torch.randn(len(ids), WIDTH, generator=generator, dtype=torch.float64).to(self.values.dtype)
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        self.whole.grad = torch.sparse_coo_tensor(ids[None], gradient, self.whole.shape, check_invariants=False)
        self.optimizer.step()
        self.update(ids, gradient, {} if lr is None else {**self.described.settings, "lr": lr})

    def update(self, ids: Tensor, gradient: Tensor, settings: dict[str, Any]) -> None:
        before = gradient.clone()
        self.rule.update(ids.numpy(), gradient, settings).apply()
        assert torch.equal(gradient, before), "a gradient is only read"

    def assert_equal(self) -> None:
        tolerance = TOLERANCE[self.values.dtype]
        torch.testing.assert_close(self.values, self.whole.detach(), rtol=tolerance, atol=tolerance)
        theirs = self.optimizer.state[self.whole]
        for slot, mine in self.rule.state(0, self.values.numel()).items():
            like = torch.as_tensor(theirs[slot], dtype=mine.dtype).flatten() if mine.ndim else theirs[slot]
            torch.testing.assert_close(mine, torch.as_tensor(like, dtype=mine.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_row
def test_every_step_is_the_one_that_torch_makes_on_the_whole_table(name, kwargs, dtype):
    tables = Tables(name, kwargs, dtype)
    first = tables.values.clone()
    for seed in range(STEPS):
        tables.step(seed)
        tables.assert_equal()
    assert set(tables.rule.state(0, tables.values.numel())) == SLOTS[name]
    assert not torch.equal(tables.values, first)


@every_row
def test_the_learning_rate_may_change_with_every_step_and_stays_if_it_is_left_out(name, kwargs):
    tables = Tables(name, kwargs)
    for seed, lr in enumerate([None, 0.5, 0.25, None, 0.125]):
        tables.step(seed, lr)
        tables.assert_equal()


@every_row
def test_a_step_without_rows_counts_as_it_does_for_torch(name, kwargs):
    tables = Tables(name, kwargs)
    for seed in (1, 2):
        tables.whole.grad = torch.sparse_coo_tensor(
            torch.empty(1, 0, dtype=torch.int64), torch.empty(0, WIDTH, dtype=torch.float64), tables.whole.shape,
            check_invariants=False,
        )  # fmt: skip
        tables.optimizer.step()
        tables.update(torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH, dtype=torch.float64), {})
        tables.step(seed)
        tables.assert_equal()


def test_rows_without_a_gradient_keep_values_and_slots():
    tables = Tables("SparseAdam", {"lr": 0.1})
    tables.step(4)
    before, slots = tables.values.clone(), {name: slot.table.clone() for name, slot in tables.rule._slots.items()}
    tables.update(torch.tensor([2, 5]), torch.ones(2, WIDTH, dtype=torch.float64), {})
    others = [row for row in range(COUNT) if row not in (2, 5)]
    assert torch.equal(tables.values[others], before[others])
    assert not (tables.values[[2, 5]] == before[[2, 5]]).any()
    for name, slot in slots.items():
        assert torch.equal(tables.rule._slots[name].table[others], slot[others])


@every_row
def test_values_are_written_by_what_comes_back_and_by_nothing_else(name, kwargs):
    tables = Tables(name, kwargs)
    before, rest = tables.values.clone(), [0, *range(2, COUNT)]
    update = tables.rule.update(np.array([1]), torch.ones(1, WIDTH, dtype=torch.float64), {})
    assert torch.equal(tables.values, before)
    update.apply()
    assert not (tables.values[1] == before[1]).any()
    assert torch.equal(tables.values[rest], before[rest])


@pytest.mark.parametrize("size_of_tables", ["loops"], indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 16, 21, 64])
@pytest.mark.parametrize(("name", "kwargs"), LOOPS, ids=str)
def test_a_loop_makes_torchs_step_bit_by_bit(monkeypatch, name, kwargs, width, dtype):
    """Also in rows that the loop asks for ahead, and in those that it does not any more."""
    generator = torch.Generator().manual_seed(0)
    count, described = 300, describe_row_rule(RULES[name].optimizer([torch.zeros(1)], **kwargs), 0, "table")
    first = torch.randn(count, width, generator=generator).to(dtype)
    tables = []
    for large in (0, 1 << 62):
        monkeypatch.setattr(rows, "LARGE", large)
        tables.append(rule := RowRule(described, first.clone()))
        rule.update(np.array([], dtype=np.int64), first[:0], described.settings).apply()  # makes its slots
    assert [rule.rows.loops is None for rule in tables] == [False, True]
    for seed in range(4):
        generator.manual_seed(seed)
        ids = torch.randperm(count, generator=generator)[: 5 + 80 * seed].sort().values.numpy()
        gradient = torch.randn(len(ids), width, generator=generator).to(dtype) * 10.0 ** (seed - 2)
        for rule in tables:
            rule.update(ids, gradient, described.settings).apply()
    mine, theirs = ({"values": rule.rows.table, **rule.state(0, count * width)} for rule in tables)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[slot], theirs[slot]) for slot in mine)
    assert not torch.equal(mine["values"], first)


def test_torch_makes_the_steps_of_numbers_that_no_loop_knows():
    values = torch.zeros(4, 2, dtype=torch.bfloat16)
    rule = RowRule(Rule("SGD", {"lr": 1.0}), values)
    rule.update(np.array([1]), torch.ones(1, 2, dtype=torch.bfloat16), {}).apply()
    assert values.tolist() == [[0, 0], [-1, -1], [0, 0], [0, 0]]


@pytest.mark.parametrize("name", ["Adagrad", "SparseAdam"])
def test_a_step_that_torch_cannot_make_is_not_counted(name):
    tables = Tables(name, {"lr": 0.1})
    tables.step(1)
    ids, gradient = torch.tensor([1]), torch.ones(1, WIDTH, dtype=torch.float64)
    with pytest.raises(TypeError):
        tables.update(ids, gradient, {"lr": None})
    tables.assert_equal()
    tables.step(2, lr=0.1)
    tables.assert_equal()


# --- slots, block by block

BLOCKS = [1, 2, 4, 7, COUNT * WIDTH, 1000]
"""Elements of a block, of which most divide no row."""


def blocks_of(rule: RowRule, size: int) -> list[row_rule.RowRuleBlock]:
    return [rule.block(index) for index in range(-(-COUNT * WIDTH // size))]


@pytest.mark.parametrize("size", BLOCKS)
@every_row
def test_slots_of_all_blocks_make_another_rule_go_on_alike(monkeypatch, name, kwargs, size):
    monkeypatch.setattr(row_rule, "BLOCK", size)
    tables = Tables(name, kwargs)
    for seed in range(3):
        tables.step(seed)
    other = RowRule(tables.described, tables.values.clone())
    for mine, theirs in zip(blocks_of(tables.rule, size), blocks_of(other, size), strict=True):
        for start, stop, state in mine.slots():
            theirs.load(start, stop, state)
    tables.rule = other  # which goes on beside torch's
    for seed in range(3, 6):
        tables.values = other.rows.table
        tables.step(seed)
        tables.assert_equal()


@pytest.mark.parametrize("size", BLOCKS)
def test_slots_of_a_block_are_as_long_as_the_block(monkeypatch, size):
    monkeypatch.setattr(row_rule, "BLOCK", size)
    tables = Tables("Adagrad", {"lr": 0.1})
    blocks = blocks_of(tables.rule, size)
    assert [list(block.slots()) for block in blocks] == [[]] * len(blocks), "there are none before the first step"
    tables.step(3)
    ((_, whole),) = ((name, slot.table) for name, slot in tables.rule._slots.items())
    found = []
    for index, block in enumerate(blocks):
        ((start, stop, state),) = block.slots()
        assert (start, stop) == (0, min(size, COUNT * WIDTH - index * size))
        assert (len(state["sum"]), state["step"].ndim, state["step"].item()) == (stop, 0, 1)
        found.append(state["sum"])
    assert torch.equal(torch.cat(found), whole.flatten())


def test_a_part_of_a_block_can_be_put_back_and_is_copied(monkeypatch):
    monkeypatch.setattr(row_rule, "BLOCK", 4)
    rule = Tables("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}).rule
    slot, step = torch.full((2,), 9.0, dtype=torch.float64), torch.tensor(3.0)
    rule.block(1).load(1, 3, {"sum": slot, "step": step})
    slot.zero_()
    step.zero_()
    (state,) = [state for _, _, state in rule.block(1).slots()]
    assert state["sum"].tolist() == [0.5, 9, 9, 0.5]
    assert state["step"] == 3


DOUBLES = torch.zeros(4, dtype=torch.float64)
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        ("SGD", {"momentum_buffer": DOUBLES}, "rows of SGD: slot 'momentum_buffer' is unknown"),
        ("SGD", {"step": ONE}, "rows of SGD: slot 'step' is unknown"),
        ("Adagrad", {"step": ONE}, "rows of Adagrad: slot 'sum' is missing"),
        ("Adagrad", {"sum": DOUBLES}, "rows of Adagrad: slot 'step' is missing"),
        ("Adagrad", {"sum": DOUBLES, "step": ONE, "x": ONE}, "rows of Adagrad: slot 'x' is unknown"),
        ("SparseAdam", {"exp_avg": DOUBLES, "step": ONE}, "rows of SparseAdam: slot 'exp_avg_sq' is missing"),
        ("Adagrad", {"sum": DOUBLES[:3], "step": ONE}, r"slot 'sum' must be torch.float64 and \(4,\), got .* \(3,\)"),
        ("Adagrad", {"sum": DOUBLES.float(), "step": ONE}, "slot 'sum' must be torch.float64 .* got torch.float32"),
        ("Adagrad", {"sum": DOUBLES, "step": DOUBLES}, r"slot 'step' must be .* \(\), got torch.float64 and \(4,\)"),
    ],
)
def test_slots_of_another_rule_are_refused_by_name_and_change_nothing(name, state, words):
    tables = Tables(name, {"lr": 0.1})
    tables.step(1)
    before = {slot: tensor.clone() for slot, tensor in tables.rule.state(0, COUNT * WIDTH).items()}
    with pytest.raises(ValueError, match=words):
        tables.rule.block(0).load(0, 4, state)
    after = tables.rule.state(0, COUNT * WIDTH)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[slot], before[slot]) for slot in before)


def test_bytes_of_slots_are_those_of_the_whole_table():
    tables = Tables("SparseAdam", {"lr": 0.1})
    assert tables.rule.slot_bytes == 0
    tables.step(0)
    assert tables.rule.slot_bytes == 2 * tables.values.nbytes


# --- what is no rule for rows


@pytest.mark.parametrize(
    ("name", "message"),
    [("Adam", "the update rule 'Adam' has no form for rows"), ("Nonsense", "no update rule is called 'Nonsense'")],
)
def test_a_rule_without_a_row_form_is_refused(name, message):
    with pytest.raises(UnsupportedOptimizerError, match=message):
        RowRule(Rule(name, {}), torch.zeros(2, 2))


def test_a_setting_that_torch_refuses_is_refused_when_the_rule_is_made():
    with pytest.raises(ConfigError, match=r"torch.optim.SparseAdam refuses .*learning rate"):
        RowRule(Rule("SparseAdam", {"lr": -1.0}), torch.zeros(2, 2))


def test_every_rule_for_rows_is_tested():
    assert {name for name, _ in ROWS} == {name for name, rule in RULES.items() if rule.row_slots}
    assert all(issubclass(rule.optimizer, optim.Optimizer) for rule in RULES.values())


def test_a_reset_makes_all_rows_begin_again() -> None:
    ids, gradient, settings = np.arange(3), torch.ones(3, 2), {"lr": 0.5}
    rule = RowRule(Rule("Adagrad", {"lr": 0.5, "initial_accumulator_value": 0.25}), torch.zeros(4, 2))
    rule.update(ids, gradient, settings).apply()
    rule.block(0).reset(0, 8)
    assert list(rule.block(0).slots()) == []
    other = RowRule(Rule("Adagrad", {"lr": 0.5, "initial_accumulator_value": 0.25}), rule.rows.table.clone())
    for each in (rule, other):
        each.update(ids, gradient, settings).apply()
    assert torch.equal(rule.rows.table, other.rows.table)


def test_a_setting_that_would_move_other_rows_is_not_adopted() -> None:
    block = RowRule(Rule("SGD", {"lr": 0.5}), torch.zeros(4, 2)).block(0)
    block.adopt({"lr": 0.1, "momentum": 0.0})
    with pytest.raises(ValueError, match="would move rows"):
        block.adopt({"lr": 0.1, "momentum": 0.9})
