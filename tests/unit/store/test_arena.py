"""Operations on pieces, whole blocks, and slots of variables that blocks cut."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import describe, find_rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import private_store_memory
from paramserver.store import arena, block_rule
from paramserver.store.arena import StoredArena
from paramserver.store.blocks import BlockCopy, SlotKind
from paramserver.store.shards.parts import overlaps

ADAM = describe(torch.optim.Adam([torch.zeros(1)], lr=0.5), 0)
SGD = describe(torch.optim.SGD([torch.zeros(1)], lr=0.5), 0)


def arena_of(*sizes, rule=SGD, dtype="float32"):
    layout = ArenaLayout(dtype, rule, tuple(VariableSpec(f"v{i}", (size,), dtype) for i, size in enumerate(sizes)))
    memory = private_store_memory([layout])
    return StoredArena(layout, memory.values[0], memory.versions[0]), memory.versions[0]


def snapshot(arena):
    """The values, and the slots as runs, copied block by block."""
    copy, values, runs = BlockCopy(), [], []
    for block in range(len(arena.layout.pieces)):
        arena.copy_block(block, copy)
        values.append(copy.values.clone())
        for start, stop, state in copy.runs:
            runs.append((start, stop, {name: slot.clone() for name, slot in state.items()}))
    return torch.cat(values), runs


def slots_of(span, runs):
    """The slots of one variable, flat."""
    parts = {}
    for _, run, (start, stop) in overlaps([span], [run[:2] for run in runs]):
        first, _, state = runs[run]
        for name, slot in state.items():
            parts.setdefault(name, []).append(slot[start - first : stop - first] if slot.ndim else slot)
    return {name: torch.cat(slots) if slots[0].ndim else slots[0] for name, slots in parts.items()}


def push(arena, source, operation="rule"):
    for start, stop in arena.layout.pieces:
        arena.apply(operation, (start, stop), source[start:stop], None)


def test_assign_add_and_rule():
    arena, versions = arena_of(4)
    push(arena, torch.full((4,), 2.0), "assign")
    push(arena, torch.ones(4), "add")
    assert arena.values.tolist() == [3.0] * 4
    push(arena, torch.ones(4))
    assert arena.values.tolist() == [2.5] * 4
    assert versions.tolist() == [6]


def test_an_operation_reaches_its_piece_only():
    arena, _ = arena_of(4)
    arena.apply("add", (1, 3), torch.ones(2), None)
    assert arena.values.tolist() == [0, 1, 1, 0]


def test_who_holds_the_lock_of_an_element_keeps_its_block_as_it_is():
    arena, _ = arena_of(4)
    with ThreadPoolExecutor(1) as pool:
        with arena.lock(2):
            update = pool.submit(arena.apply, "add", (0, 1), torch.ones(1), None)
            with pytest.raises(TimeoutError):
                update.result(0.05)
            assert arena.values.tolist() == [0, 0, 0, 0]
        update.result()
    assert arena.values.tolist() == [1, 0, 0, 0]


def test_a_failed_operation_leaves_an_even_version():
    arena, versions = arena_of(4)
    with pytest.raises(ValueError, match="shape"):
        arena.apply("rule", (0, 4), torch.ones(3), None)
    assert versions.tolist() == [2]


@pytest.mark.parametrize(
    ("rule", "operation", "ranges", "settings", "words"),
    [
        (None, "rule", None, None, "no update rule"),
        (SGD, "rule", None, {"params": 1.0}, "no setting 'params'"),
        (SGD, "rule", ((0, 9),), None, r"\[0, 9\) .*8"),
        (SGD, "assign", ((-1, 2),), None, r"\[-1, 2\)"),
        (SGD, "add", ((2, 2),), None, r"\[2, 2\)"),
        (SGD, "add", ((0, 2), (5, 3)), None, r"\[5, 3\)"),
    ],
)
def test_what_cannot_be_applied_is_found_before_anything_is(rule, operation, ranges, settings, words):
    arena, versions = arena_of(8, rule=rule)
    with pytest.raises(ValueError, match=words):
        arena.check(operation, ranges, settings)
    assert versions.tolist() == [0]


def test_what_can_be_applied_passes():
    arena, _ = arena_of(8)
    arena.check("rule", ((0, 8),), {"lr": 0.5})
    arena.check("add", None, None)


def test_a_snapshot_while_pushes_go_on_is_whole_in_each_block():
    arena, _ = arena_of(2 * BLOCK)
    one, over = torch.ones(2 * BLOCK), threading.Event()

    def keep_adding():
        while not over.is_set():
            push(arena, one, "add")

    thread = threading.Thread(target=keep_adding)
    thread.start()
    try:
        snapshots = [snapshot(arena)[0] for _ in range(10)]
    finally:
        over.set()
        thread.join()
    assert arena.values[0] > 0
    for values in snapshots:
        for block in values.split(BLOCK):
            assert block.min() == block.max()


def test_slots_of_a_variable_that_blocks_cut_are_put_together():
    arena, _ = arena_of(10, 2 * BLOCK, 10, rule=ADAM)
    gradient = torch.randn(arena.layout.size)
    push(arena, gradient)
    _, runs = snapshot(arena)
    for span in arena.layout.ranges:
        slots = slots_of(span, runs)
        assert set(slots) == {"step", "exp_avg", "exp_avg_sq"}
        assert slots["step"] == 1
        torch.testing.assert_close(slots["exp_avg"], gradient[slice(*span)] * 0.1)


def test_loaded_slots_go_on_as_if_nothing_had_happened():
    arena, _ = arena_of(10, BLOCK, rule=ADAM)
    gradient = torch.randn(arena.layout.size)
    push(arena, gradient)
    values, runs = snapshot(arena)
    other, _ = arena_of(10, BLOCK, rule=ADAM)
    push(other, values, "assign")
    for span in arena.layout.ranges:
        other.load_slots(span, slots_of(span, runs))
    other.join_runs()
    push(arena, gradient)
    push(other, gradient)
    for span in arena.layout.ranges:
        assert torch.equal(arena.values[slice(*span)], other.values[slice(*span)])


@pytest.mark.parametrize("first", [0, BLOCK])
def test_slots_are_told_for_the_elements_that_have_them(first):
    arena, _ = arena_of(2 * BLOCK, rule=ADAM)
    arena.apply("rule", (first, first + BLOCK), torch.ones(BLOCK), None)
    elementwise, scalar = SlotKind("float32", False), SlotKind("float32", True)
    expected = {"step": scalar, "exp_avg": elementwise, "exp_avg_sq": elementwise}
    assert list(arena.slot_kinds()) == [(first, first + BLOCK, expected)]


def test_a_copy_uses_its_memory_again_and_counts_its_time():
    arena, _ = arena_of(2 * BLOCK, rule=ADAM)
    push(arena, torch.ones(2 * BLOCK))
    copy, memory = BlockCopy(), set()
    for block in (0, 1):
        arena.copy_block(block, copy)
        memory.add((copy.values.data_ptr(), copy.runs[0][2]["exp_avg"].data_ptr()))
        assert copy.runs[0][:2] == (block * BLOCK, (block + 1) * BLOCK)
    assert len(memory) == 1
    assert 0 < copy.longest < copy.pause


def test_what_is_filled_is_locked_and_odd_meanwhile():
    arena, versions = arena_of(4)
    with arena.filling((1, 3)) as room:
        assert arena._locks[0].locked()
        assert versions.tolist() == [1]
        room.fill_(7.0)
    assert arena.values.tolist() == [0, 7, 7, 0]
    assert versions.tolist() == [2]


def test_all_blocks_of_what_is_filled_are_locked_and_odd_meanwhile():
    arena, versions = arena_of(4 * BLOCK)
    with arena.filling((BLOCK - 1, 3 * BLOCK)) as room:
        assert [lock.locked() for lock in arena._locks] == [True, True, True, False]
        assert versions.tolist() == [1, 1, 1, 0]
        room.fill_(7.0)
    assert not any(lock.locked() for lock in arena._locks)
    assert versions.tolist() == [2, 2, 2, 0]
    assert arena.values.nonzero().flatten()[[0, -1]].tolist() == [BLOCK - 1, 3 * BLOCK - 1]


def test_slots_for_variables_that_no_optimizer_updates_do_not_fit():
    arena, _ = arena_of(4, rule=None)
    with pytest.raises(ValueError, match="no optimizer"):
        arena.load_slots((0, 4), {"exp_avg": torch.zeros(4)})


def test_slot_bytes_count_all_blocks():
    arena, _ = arena_of(BLOCK + 4, rule=ADAM)
    assert arena.slots_bytes == 0
    push(arena, torch.ones(BLOCK + 4))
    assert arena.slots_bytes == 2 * 4 * (BLOCK + 4) + 2 * 4


def test_after_a_restore_one_update_serves_all_variables_again():
    """The gaps between variables have slots too; without them no two variables would be neighbours."""
    arena, _ = arena_of(10, 3, 21, rule=ADAM)
    push(arena, torch.ones(arena.layout.size))
    _, runs = snapshot(arena)
    other, _ = arena_of(10, 3, 21, rule=ADAM)
    for span in other.layout.ranges:
        other.load_slots(span, slots_of(span, runs))
    other.join_runs()
    assert "1 runs" in repr(other._rules[0])


def test_the_rule_of_an_arena_is_looked_up_once_for_all_blocks(monkeypatch):
    """A rule of an installed package is searched for in the metadata of all packages, which takes milliseconds."""
    looked_up = []
    for module in (arena, block_rule):
        monkeypatch.setattr(module, "find_rule", lambda rule: looked_up.append(rule) or find_rule(rule))
    arena_of(3 * BLOCK)
    assert looked_up == [SGD]
