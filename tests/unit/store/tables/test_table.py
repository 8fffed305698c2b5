"""Rows of a table: what changes them, which blocks that marks, and readers of its memory who never see half a row."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from paramserver.layout import blocks
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import Rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory import rows
from paramserver.memory.arena_memory import StoreMemory, private_store_memory
from paramserver.store import arena as stored_arena
from paramserver.store import blocks as stored_blocks
from paramserver.store.blocks import BlockCopy
from paramserver.store.tables import row_rule
from paramserver.store.tables.row_rule import RowUpdate
from paramserver.store.tables.table import StoredTable
from paramserver.transport import shared_memory
from paramserver.transport.lane import TableRows

SGD = Rule("SGD", {"lr": 0.5})
ADAGRAD = Rule("Adagrad", {"lr": 0.5})
COUNT, WIDTH, BLOCK = 7, 3, 4
"""21 elements in 6 blocks: row 0 lies in block 0, row 1 in the blocks 0 and 1, and so on."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, row_rule, stored_arena, stored_blocks, shared_memory):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


def a_table(rule: Rule = SGD, width: int = WIDTH) -> tuple[StoredTable, StoreMemory]:
    spec = VariableSpec("words", (COUNT, width), "float32")
    memory = private_store_memory([layout := ArenaLayout("float32", rule, (spec,), is_table=True)])
    return StoredTable(layout, memory.values[0], memory.versions[0]), memory


def ids_of(*rows: int) -> Any:
    return np.array(rows, dtype=np.int64)


def filled(*rows: float) -> torch.Tensor:
    return torch.tensor(rows).float()[:, None].expand(-1, WIDTH).contiguous()


def firsts(table: StoredTable) -> list[float]:
    """Of each row its one value."""
    rows = table.read_rows(np.arange(COUNT))
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].tolist()


# --- what is done to rows


def test_assign_add_and_rule_reach_the_rows_that_are_named():
    table, _ = a_table()
    table.apply_rows("assign", ids_of(1, 2, 6), filled(1, 2, 6), None)
    table.apply_rows("add", ids_of(0, 2), filled(10, 10), None)
    assert firsts(table) == [10, 1, 12, 0, 0, 0, 6]
    table.apply_rows("rule", ids_of(2, 6), filled(2, 4), {"lr": 0.5})
    assert firsts(table) == [10, 1, 11, 0, 0, 0, 4]
    table.apply_rows("rule", ids_of(2), filled(2), {"lr": 1.0})
    assert firsts(table) == [10, 1, 9, 0, 0, 0, 4]


@pytest.mark.parametrize("operation", ["assign", "add", "rule"])
def test_what_is_pushed_is_only_read(operation):
    table, _ = a_table(ADAGRAD)
    ids, source = ids_of(0, 3), filled(1, 2)
    table.apply_rows(operation, ids, source, {"lr": 0.5} if operation == "rule" else None)
    table.apply_rows("add", ids, filled(5, 5), None)
    assert ids.tolist() == [0, 3]
    assert torch.equal(source, filled(1, 2))


def test_what_was_read_is_a_copy():
    table, _ = a_table()
    rows = table.read_rows(ids_of(0, 6))
    table.apply_rows("add", ids_of(0, 6), filled(1, 1), None)
    assert not rows.any()


@pytest.mark.parametrize("operation", ["assign", "add", "rule"])
@pytest.mark.parametrize(
    ("rows", "blocks"),
    [([], []), ([0], [0]), ([1], [0, 1]), ([2], [1, 2]), ([3], [2]), ([0, 1], [0, 1]), ([0, 6], [0, 4, 5]), ([4], [3])],
)
def test_the_versions_of_exactly_the_blocks_that_rows_lie_in_go_up_by_two(operation, rows, blocks):
    table, memory = a_table()
    table.apply_rows(operation, ids_of(*rows), filled(*rows) if rows else torch.empty(0, WIDTH), {"lr": 1.0})
    assert memory.versions[0].tolist() == [2 if block in blocks else 0 for block in range(6)]


def test_all_blocks_are_marked_for_many_rows(monkeypatch):
    monkeypatch.setattr(blocks, "ROWS_PER_BLOCK", 0.5)
    table, memory = a_table()
    table.apply_rows("assign", ids_of(0, 3, 6), filled(1, 2, 3), None)
    assert memory.versions[0].tolist() == [2, 0, 2, 0, 2, 2]
    table.apply_rows("assign", ids_of(0, 1, 5, 6), filled(5, 6, 7, 8), None)
    assert memory.versions[0].tolist() == [4, 2, 4, 2, 4, 4]


def test_blocks_are_marked_while_rows_are_put_back_and_not_while_they_are_computed(monkeypatch):
    table, memory = a_table()
    seen: dict[str, list[int]] = {}
    update, put = table._rule.update, table._rule.rows.put

    def computing(*args: Any) -> Any:
        seen["computing"] = memory.versions[0].tolist()
        return update(*args)

    def putting(*args: Any) -> None:
        seen["putting"] = memory.versions[0].tolist()
        put(*args)

    monkeypatch.setattr(table._rule, "update", computing)
    monkeypatch.setattr(table._rule.rows, "put", putting)
    table.apply_rows("rule", ids_of(1), filled(1), {"lr": 1.0})
    assert seen == {"computing": [0] * 6, "putting": [1, 1, 0, 0, 0, 0]}


def test_blocks_are_marked_while_a_loop_changes_rows_where_they_lie(monkeypatch):
    monkeypatch.setattr(rows, "LARGE", 0)
    table, memory = a_table(ADAGRAD)
    seen: list[list[int]] = []
    update = table._rule.update

    def noting(*args: Any) -> RowUpdate:
        prepared = update(*args)
        seen.append(memory.versions[0].tolist())

        def apply_and_note() -> None:
            seen.append(memory.versions[0].tolist())
            prepared.apply()

        return RowUpdate(apply_and_note, ())

    monkeypatch.setattr(table._rule, "update", noting)
    table.apply_rows("rule", ids_of(1), filled(1), {"lr": 1.0})
    assert seen == [[0] * 6, [1, 1, 0, 0, 0, 0]]
    assert memory.versions[0].tolist() == [2, 2, 0, 0, 0, 0]
    assert firsts(table) == [0, -1, 0, 0, 0, 0, 0]


def test_versions_are_even_after_an_update_that_failed():
    table, memory = a_table()
    with pytest.raises(ValueError, match="putting 1 rows"):
        table.apply_rows("assign", ids_of(1), torch.zeros(1, WIDTH + 1), None)
    with pytest.raises(TypeError):
        table.apply_rows("rule", ids_of(1), filled(1), {"lr": None})
    assert not (memory.versions[0] % 2).any()
    table.apply_rows("add", ids_of(1), filled(1), None)
    assert firsts(table) == [0, 1, 0, 0, 0, 0, 0]


def test_rows_can_be_told_from_those_that_no_ps_could_change():
    table, memory = a_table()
    for operation in ("rule", "assign", "add"):
        table.check_rows(operation, COUNT, {"lr": 1.0})
        table.check_rows(operation, 0, None)
    for ids in (ids_of(), ids_of(0), ids_of(0, 6), np.arange(COUNT)):
        table.check_ids(ids)
    assert not memory.versions[0].any()


@pytest.mark.parametrize(
    ("operation", "count", "settings", "words"),
    [
        ("add", COUNT + 1, None, "it has 7 rows, and 8 different ones were named"),
        ("assign", -1, None, "it has 7 rows, and -1 different"),
        ("rule", 1, {"params": 1.0}, "SGD has no setting 'params'"),
        ("rule", 1, {"momentum": 0.9}, "momentum=0.9 would move rows"),
        ("rule", 1, {"weight_decay": 0.1}, "weight_decay=0.1 would move rows"),
    ],
)
def test_what_cannot_be_done_to_rows_is_found_beforehand(operation, count, settings, words):
    with pytest.raises(ValueError, match=words):
        a_table()[0].check_rows(operation, count, settings)


@pytest.mark.parametrize("ids", [[-1], [COUNT], [1, 1], [2, 1], [0, 5, 3], [-2, 0], [2**62], [-(2**63), 3]])
def test_ids_that_are_none_are_found_beforehand(ids):
    with pytest.raises(ValueError, match="the ids of its 7 rows must ascend from 0, none twice, and be less"):
        a_table()[0].check_ids(ids_of(*ids))


# --- several at once


@pytest.mark.parametrize("operation", ["add", "rule"])
def test_of_pushes_at_the_same_time_none_is_lost(operation):
    table, memory = a_table()
    rounds, sets = 50, [ids_of(0, 1, 2), ids_of(1, 2, 3), ids_of(2, 5, 6), np.arange(COUNT)]

    def push(ids: Any) -> None:
        for _ in range(rounds):
            table.apply_rows(operation, ids, torch.full((len(ids), WIDTH), -1.0), {"lr": 1.0})

    with ThreadPoolExecutor(len(sets)) as pool:
        list(pool.map(push, sets))
    sign = -1 if operation == "add" else 1
    assert firsts(table) == [sign * rounds * sum(row in ids for ids in sets) for row in range(COUNT)]
    assert not (memory.versions[0] % 2).any()


def test_a_table_is_locked_and_the_blocks_of_what_is_filled_are_odd_meanwhile():
    table, memory = a_table()
    with ThreadPoolExecutor(1) as pool, table.filling((2, 17)) as room:
        assert memory.versions[0].tolist() == [1, 1, 1, 1, 1, 0]
        reading = pool.submit(table.read_rows, ids_of(1))
        assert table._lock.locked()
        room.fill_(7.0)
    assert reading.result().tolist() == [[7, 7, 7]]
    assert memory.versions[0].tolist() == [2, 2, 2, 2, 2, 0]
    assert not table._lock.locked()


def test_a_restore_that_another_thread_ends_lets_go_of_the_table():
    """As when a connection is lost in the middle of it, and the collector finds what it had begun."""
    table, memory = a_table()
    filling = table.filling((0, 21))
    filling.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(filling.__exit__, None, None, None).result(30)
        pool.submit(table.apply_rows, "add", ids_of(0), filled(1), None).result(30)
    assert firsts(table)[0] == 1
    assert memory.versions[0].tolist() == [4, 2, 2, 2, 2, 2]


# --- checkpoints


def test_a_checkpoint_copies_values_and_slots_block_by_block():
    table, _ = a_table(ADAGRAD)
    table.apply_rows("rule", ids_of(1, 6), filled(3, 4), {"lr": 0.5})
    copy, values, sums = BlockCopy(), [], []
    for block in range(6):
        table.copy_block(block, copy)
        values.append(copy.values.clone())
        ((start, stop, state),) = copy.runs
        assert (start, stop) == (block * BLOCK, min((block + 1) * BLOCK, COUNT * WIDTH))
        assert state["step"] == 1
        sums.append(state["sum"].clone())
    assert torch.equal(torch.cat(values).view(COUNT, WIDTH), table.read_rows(np.arange(COUNT)))
    assert torch.cat(sums).view(COUNT, WIDTH)[:, 0].tolist() == [0, 9, 0, 0, 0, 0, 16]
    assert table.slots_bytes == COUNT * WIDTH * 4
    assert [run[:2] for run in table.slot_kinds()] == [(4 * i, min(4 * i + 4, 21)) for i in range(6)]


# --- who reads the memory itself


def reader(memory: StoreMemory) -> shared_memory._RowsCopy:
    return shared_memory._RowsCopy(memory, 0, WIDTH)


def test_a_reader_of_the_memory_gets_the_rows_that_it_names():
    table, memory = a_table()
    table.apply_rows("assign", np.arange(COUNT), filled(*range(COUNT)), None)
    for ids in (ids_of(), ids_of(4), ids_of(0, 1, 6), np.arange(COUNT), ids_of(6, 0, 6, 1)):
        out = torch.full((len(ids), WIDTH), -1.0)
        assert reader(memory).run(TableRows(ids, out))
        assert torch.equal(out, table.read_rows(ids))


class Overtaken:
    """Versions as a reader sees them, with something happening before a look at them."""

    def __init__(self, versions: Any, events: dict[int, Any]) -> None:
        self.versions, self.events, self.looks = versions, events, itertools.count()

    def __getitem__(self, blocks: Any) -> Any:
        self.events.get(next(self.looks), lambda: None)()
        return self.versions[blocks]

    def __len__(self) -> int:
        return len(self.versions)


def overtaken(memory: StoreMemory, events: dict[int, Any]) -> shared_memory._RowsCopy:
    """A reader for which things happen at its looks: one before it copies, one after, and so on again."""
    copy = reader(memory)
    copy._versions = Overtaken(memory.versions[0], events)  # type: ignore[assignment]  # only looked up in
    return copy


def test_a_row_that_was_written_while_it_was_copied_is_copied_again():
    table, memory = a_table()
    copy = overtaken(memory, {1: lambda: table.apply_rows("assign", ids_of(1), filled(5), None)})
    out = torch.full((3, WIDTH), -1.0)
    assert copy.run(TableRows(ids_of(1, 3, 6), out))
    assert torch.equal(out, filled(5, 0, 0))
    assert next(copy._versions.looks) == 4, "it was copied twice"  # type: ignore[attr-defined]


def test_a_row_is_copied_again_for_each_of_its_blocks():
    """Row 1 has its first element in block 0 and its others in block 1."""
    for block in (0, 1):
        _, memory = a_table()

        def write(memory: StoreMemory = memory, block: int = block) -> None:
            memory.versions[0][block] += 2
            memory.values[0][3:6] = 5

        copy = overtaken(memory, {1: write})
        out = torch.empty(1, WIDTH)
        assert copy.run(TableRows(ids_of(1), out))
        assert out.tolist() == [[5] * WIDTH]


def test_only_rows_that_were_overtaken_are_copied_again_until_none_is():
    table, memory = a_table()
    copied: list[list[int]] = []
    copy = overtaken(
        memory,
        {
            1: lambda: table.apply_rows("add", ids_of(0, 3, 6), filled(1, 1, 1), None),
            3: lambda: table.apply_rows("add", ids_of(3), filled(1), None),
        },
    )
    original = copy._copy

    def note(ids: Any, out: torch.Tensor) -> Any:
        copied.append(ids.tolist())
        return original(ids, out)

    copy._copy = note  # type: ignore[method-assign]
    out = torch.empty(4, WIDTH)
    assert copy.run(TableRows(ids_of(0, 3, 4, 6), out))
    assert copied == [[0, 3, 4, 6], [0, 3, 6], [3]]
    assert torch.equal(out, filled(1, 2, 0, 1))


def test_a_row_that_is_being_written_is_waited_for(monkeypatch):
    monkeypatch.setattr(shared_memory, "QUIET_LIMIT", 60)
    _table, memory = a_table()
    memory.versions[0][1] += 1

    def end() -> None:
        memory.values[0][3:6] = 3
        memory.versions[0][1] += 1

    out, copy = torch.full((2, WIDTH), -1.0), overtaken(memory, {2: end})
    assert copy.run(TableRows(ids_of(1, 6), out))
    assert torch.equal(out, filled(3, 0))
    assert next(copy._versions.looks) == 4, "it was copied once"  # type: ignore[attr-defined]


def test_rows_that_others_keep_writing_to_are_given_up(monkeypatch):
    """Then the ps is asked, which has a lock; or cannot be any more, if it has died while it wrote."""
    monkeypatch.setattr(shared_memory, "QUIET_LIMIT", 0)
    table, memory = a_table()
    memory.versions[0][1] += 1
    copy = overtaken(memory, {})
    assert not copy.run(TableRows(ids_of(0, 2), torch.empty(2, WIDTH)))
    assert next(copy._versions.looks) == 2 * (1 + shared_memory.ROW_TRIES)  # type: ignore[attr-defined]
    assert reader(memory).run(TableRows(ids_of(0, 6), torch.empty(2, WIDTH)))
    memory.versions[0][1] += 1
    add = dict.fromkeys(range(1, 200, 2), lambda: table.apply_rows("add", ids_of(0), filled(1), None))
    assert not overtaken(memory, add).run(TableRows(ids_of(0), torch.empty(1, WIDTH)))


def test_a_reader_never_sees_half_a_row_while_it_is_written(monkeypatch):
    assert torn_rows(monkeypatch, rounds=200) == 0


def test_a_copy_that_is_not_checked_is_torn(monkeypatch):
    """So that the test above can fail."""
    original = shared_memory._RowsCopy._copy
    monkeypatch.setattr(shared_memory._RowsCopy, "_copy", lambda *args: original(*args)[:0])
    assert torn_rows(monkeypatch, rounds=1_000_000) == 1


def torn_rows(monkeypatch: pytest.MonkeyPatch, rounds: int) -> int:
    """How many of the long rows read in as many rounds, while a thread writes, are torn: the first only."""
    for module in (blocks, row_rule, stored_arena, stored_blocks, shared_memory):
        monkeypatch.setattr(module, "BLOCK", 50_000)
    width = 120_001  # each row lies in three or four blocks
    (table, memory), over, values = a_table(width=width), threading.Event(), set[float]()
    sources = [torch.full((1, width), float(value)) for value in range(4)]

    def keep_writing() -> None:
        for source in itertools.cycle(sources):
            for row in (1, 6, 6, 6, 6):  # row 6 has no block in common with row 1, which is left in peace meanwhile
                table.apply_rows("assign", ids_of(row), source, None)
            if over.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(keep_writing)
        try:
            while rounds or len(values) < 2:
                rounds = max(rounds - 1, 0)
                out = torch.empty(1, width)
                if shared_memory._RowsCopy(memory, 0, width).run(TableRows(ids_of(1), out)):
                    values.add(out[0, 0].item())
                    if (out != out[0, 0]).any():
                        return 1
        finally:
            over.set()
        writing.result()
    return 0
