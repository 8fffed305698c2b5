"""Shards of checkpoints: into any number of ps tasks, into plain PyTorch, and what is wrong with a broken one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paramserver.checkpoint.folder import CheckpointFolder, Read
from paramserver.checkpoint.index import SLOTS_INDEX, VALUES_INDEX, Maps, merge_maps, read_index
from paramserver.errors import CheckpointError, NotFiniteError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK, pieces
from paramserver.layout.rules import describe
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.memory.arena_memory import private_store_memory
from paramserver.placement import FixedShards, row_ranges
from paramserver.store.blocks import BlockCopy
from paramserver.store.shards import restore, save
from paramserver.store.shards.parts import overlaps, stored_parts
from paramserver.store.store import Store

ADAM = describe(torch.optim.Adam([torch.zeros(1)]), 0)
ADAGRAD = describe(torch.optim.Adagrad([torch.zeros(1)]), 0)
SHAPES = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8), "2.bias": (3,)}


def layout(shapes, rule=ADAM, dtype="float32"):
    return ArenaLayout(dtype, rule, tuple(VariableSpec(name, shape, dtype) for name, shape in shapes.items()))


COUNTS = layout({"1.num_batches_tracked": ()}, rule=None, dtype="int64")


def place(count, shapes=SHAPES, rule=ADAM):
    """Stores that hold the variables round robin, the one counter on the last."""
    stores = [Store(f"ps:{index}", private_store_memory) for index in range(count)]
    for index, store in enumerate(stores):
        mine = dict(list(shapes.items())[index::count])
        arenas = [layout(mine, rule)] if mine else []
        store.create([*arenas, COUNTS] if index == count - 1 else arenas)
    return stores


def train(stores, steps=2):
    for store in stores:
        for arena in store.arenas:
            operation = "rule" if arena.layout.rule else "add"
            for step in range(steps):
                source = (torch.arange(arena.layout.size) + step).to(arena.values.dtype)
                for start, stop in arena.layout.pieces:
                    arena.apply(operation, (start, stop), source[start:stop], None)


def write_shard(store, directory, shard, num_shards):
    with CheckpointFolder(Path(directory)) as folder:
        return folder.run(save.write_shard(store, shard, num_shards))


def read_shard(store, directory):
    maps = [read_index(Path(directory, name)) for name in (VALUES_INDEX, SLOTS_INDEX)]
    with CheckpointFolder(Path(directory)) as folder:
        folder.run(restore.read_shard(store, str(directory), *maps))


def write(stores, directory):
    """A whole checkpoint: the shards, and the indexes that the chief writes beside them."""
    shards = [write_shard(store, str(directory), index, len(stores)) for index, store in enumerate(stores)]
    merged = merge_maps(Maps(shard.weight_map, shard.slot_map) for shard in shards)
    for name, entries in zip((VALUES_INDEX, SLOTS_INDEX), merged, strict=True):
        (directory / name).write_text(json.dumps({"weight_map": entries}))
    return shards


def state_at(place):
    """The value of a variable or part, and its slots by name, flat."""
    copy, found = BlockCopy(), {"": []}
    for block in range(place.span[0] // BLOCK, -(-place.span[1] // BLOCK)):
        place.arena.copy_block(block, copy)
        first = block * BLOCK
        start, stop = max(place.span[0], first), min(place.span[1], first + BLOCK)
        found[""].append(copy.values[start - first : stop - first].clone())
        for _, run, (begin, end) in overlaps([(start, stop)], [run[:2] for run in copy.runs]):
            run_start, _, state = copy.runs[run]
            for name, slot in state.items():
                part = slot[begin - run_start : end - run_start].clone() if slot.ndim else slot
                found.setdefault(name, []).append(part)
    return {name: torch.cat(parts) if parts[0].ndim else parts[0] for name, parts in found.items()}


def held(stores):
    """Values and slots of all variables, flat, by name."""
    return {
        f"{place.spec.name}/{name}" if name else place.spec.name: tensor
        for store in stores
        for place in stored_parts(store)
        for name, tensor in state_at(place).items()
    }


@pytest.fixture
def checkpoint(tmp_path):
    stores = place(2)
    train(stores)
    write(stores, tmp_path)
    return tmp_path


@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("read", [1, 2, 3])
def test_a_checkpoint_loads_into_any_number_of_ps(tmp_path, written, read):
    before, after = place(written), place(read)
    train(before)
    write(before, tmp_path)
    for store in after:
        read_shard(store, str(tmp_path))
    expected, found = held(before), held(after)
    assert found.keys() == expected.keys()
    assert len(found) == len(SHAPES) * 4 + 1
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_variables_that_blocks_cut_keep_values_and_slots(tmp_path):
    shapes = {"small": (5,), "large": (2 * BLOCK + 7,)}
    before, after = place(1, shapes), place(2, shapes)
    train(before, steps=1)
    write(before, tmp_path)
    for store in after:
        read_shard(store, str(tmp_path))
    train(before, steps=1)
    large = before[0].arenas[0].layout.ranges[1]
    gradient = torch.arange(large[0], large[1]).float()
    arena = after[1].arenas[0]
    for start, stop in arena.layout.pieces:
        arena.apply("rule", (start, stop), gradient[start:stop], None)
    assert torch.equal(arena.values, before[0].arenas[0].values[slice(*large)])


def test_a_value_is_read_in_several_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(restore, "READ_SIZE", 7)
    before, after = divide(2, 2), divide(3, 1)
    train_rows(before, steps=1)
    write(before, tmp_path)
    read_shard(after[0], str(tmp_path))
    torch.testing.assert_close(state_of(after), state_of(before), rtol=0, atol=0, equal_nan=True)


def test_plain_safetensors_and_a_plain_module_read_the_values(checkpoint):
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
    index = json.loads((checkpoint / VALUES_INDEX).read_text())["weight_map"]
    state = {}
    for file in set(index.values()):
        state |= load_file(checkpoint / file)
    assert state.keys() == index.keys()
    module.load_state_dict(state, strict=False)
    assert module[1].num_batches_tracked == 1
    assert module[2].weight.shape == (3, 8)
    assert torch.equal(module[2].weight, state["2.weight"])


def test_what_was_written_is_told(tmp_path):
    store = place(1)[0]
    train([store])
    (shard,) = write([store], tmp_path)
    assert set(shard.weight_map) == {*SHAPES, "1.num_batches_tracked"}
    assert set(shard.weight_map.values()) == {"model-00001-of-00001.safetensors"}
    assert set(shard.slot_map.values()) == {"optimizer-00001-of-00001.safetensors"}
    assert "0.bias/exp_avg" in shard.slot_map
    assert shard.nbytes == 67 * 4 * 3 + 8 + 4 * 4
    assert shard.pause >= 0


def test_a_store_without_variables_writes_no_file(tmp_path):
    store = Store("ps:3", private_store_memory)
    store.create([])
    assert write_shard(store, str(tmp_path), 0, 1).weight_map == {}
    assert list(tmp_path.iterdir()) == []


def test_a_scalar_variable_keeps_its_slots(tmp_path):
    before, after = place(1, {"scale": (), "w": (3,)}), place(1, {"scale": (), "w": (3,)})
    train(before)
    write(before, tmp_path)
    read_shard(after[0], str(tmp_path))
    train(before)
    train(after)
    arenas = [stores[0].arenas[0] for stores in (before, after)]
    expected, found = (arena.layout.views(arena.values) for arena in arenas)
    assert all(map(torch.equal, found, expected))


# --- partitioned variables: B06, V2-05, P07


ROWS = {"table": (10, 3), "other/table": (7,)}
RULES = {
    "Adam": ADAM,
    "momentum": describe(torch.optim.SGD([torch.zeros(1)], momentum=0.9), 0),
    "Adagrad": describe(torch.optim.Adagrad([torch.zeros(1)], initial_accumulator_value=0.5), 0),
    "SGD": describe(torch.optim.SGD([torch.zeros(1)]), 0),
}


def part_specs(name, shape, num_shards):
    whole = VariableSpec(name, shape, "float32")
    ranges = row_ranges(FixedShards(num_shards), whole)
    return [
        VariableSpec(f"{name}/part_{index}", (stop - start, *shape[1:]), "float32", Shard(name, index, start, shape[0]))
        for index, (start, stop) in enumerate(ranges)
    ] or [whole]


def divide(num_shards, num_ps, rule=ADAM, shapes=ROWS):
    """Stores that hold the parts of partitioned variables and one whole variable, round robin."""
    specs = [spec for name, shape in shapes.items() for spec in part_specs(name, shape, num_shards)]
    specs.append(VariableSpec("bias", (4,), "float32"))
    stores = [Store(f"ps:{index}", private_store_memory) for index in range(num_ps)]
    for index, store in enumerate(stores):
        mine = tuple(specs[index::num_ps])
        store.create([ArenaLayout("float32", rule, mine)] if mine else [])
    return stores


def elements(place):
    """Which elements of the whole variable are here."""
    return slice(place.skipped, place.skipped + place.spec.size)


def train_rows(stores, steps):
    """The same gradients for each element, wherever it lies."""
    for place in (place for store in stores for place in stored_parts(store)):
        for step in range(steps):
            gradient = torch.sin(torch.arange(1000.0) + len(place.variable) + step)[elements(place)]
            for start, stop in pieces([place.span]):
                place.arena.apply("rule", (start, stop), gradient[start - place.span[0] : stop - place.span[0]], None)


def state_of(stores):
    """All values and elementwise slots of each whole variable, flat, and its counters."""
    found = {}
    for place in (place for store in stores for place in stored_parts(store)):
        for key, tensor in state_at(place).items():
            name = (place.variable, key or "value")
            if tensor.ndim:
                found.setdefault(name, torch.full((30,), torch.nan))[elements(place)] = tensor
            else:
                found[name] = tensor
    return found


def value_of(stores, name):
    return state_of(stores)[name, "value"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stores", [(1, 2), (2, 3), (3, 1)], ids="ps {0[0]} to {0[1]}".format)
@pytest.mark.parametrize("shards", [(4, 1), (1, 4), (4, 2), (3, 3)], ids="shards {0[0]} to {0[1]}".format)
def test_b06_v2_05_a_partitioned_variable_loads_into_any_partitioning(tmp_path, rule, stores, shards):
    before = divide(shards[0], stores[0], RULES[rule])
    after = divide(shards[1], stores[1], RULES[rule])
    train_rows(before, steps=3)
    write(before, tmp_path)
    for store in after:
        read_shard(store, str(tmp_path))
    torch.testing.assert_close(state_of(after), state_of(before), rtol=0, atol=0, equal_nan=True)  # bit for bit
    assert ("table", "momentum_buffer") in state_of(after) or rule != "momentum"
    assert ("table", "step") in state_of(after) or rule in ("momentum", "SGD")
    train_rows(before, steps=2)
    train_rows(after, steps=2)
    # But for the rounding of torch's kernels, which differs at the end of a tensor.
    torch.testing.assert_close(state_of(after), state_of(before), rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("num_ps", [1, 2, 3])
def test_b06_plain_safetensors_reads_a_partitioned_variable_as_one_tensor(tmp_path, num_ps):
    stores = divide(4, num_ps)
    train_rows(stores, steps=3)
    write(stores, tmp_path)
    tensors = {}
    for index in (VALUES_INDEX, SLOTS_INDEX):
        for key, file in json.loads((tmp_path / index).read_text())["weight_map"].items():
            tensors[key] = load_file(tmp_path / file)[key]
    expected = state_of(stores)
    assert len(tensors) == len(expected) == 3 * 4
    assert tensors["table"].shape == tensors["table/exp_avg"].shape == (10, 3)
    assert tensors["table/step"].shape == ()
    for (name, slot), tensor in expected.items():
        found = tensors[name if slot == "value" else f"{name}/{slot}"]
        assert torch.equal(found.flatten(), tensor.flatten()[: found.numel()]), (name, slot)


def test_b06_files_of_partitioned_variables_are_named_after_them(tmp_path):
    shards = write(divide(2, 2), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model-table.safetensors",
        "model-other%2Ftable.safetensors",
        "model-00001-of-00002.safetensors",
        VALUES_INDEX,
        SLOTS_INDEX,
    }
    assert [shard.weight_map["table"] for shard in shards] == ["model-table.safetensors"] * 2


def writes_of(store, shard, num_shards):
    """What a ps writes into the files of partitioned variables: file, bytes, and whether it says they are shared."""
    for step in save.write_shard(store, shard, num_shards):
        if "-of-" not in step.file:
            yield step.file, range(step.offset, step.offset + step.content.nbytes), step.is_shared


def test_b06_what_others_may_write_beside_is_told_and_nothing_else(monkeypatch):
    """It goes to the disk at once, which makes it slow, so it must be no more than the first and last blocks."""
    page = 4096
    monkeypatch.setattr(save, "PAGE", page)
    stores = divide(2, 2, shapes={"table": (7 * BLOCK,)})
    writes = [list(writes_of(store, shard, 2)) for shard, store in enumerate(stores)]
    pages_of = [
        {(file, number) for file, span, _ in mine for number in range(span.start // page, -(-span.stop // page))}
        for mine in writes
    ]
    for mine, others in zip(writes, reversed(pages_of), strict=True):
        for file, span, is_shared in mine:
            pages = {(file, number) for number in range(span.start // page, -(-span.stop // page))}
            assert is_shared or not pages & others
    assert [[is_shared for *_, is_shared in mine] for mine in writes] == [
        [True, True, False, False, True],  # the header and four blocks
        [True, True, False, False, True],
    ]


def test_a_ps_that_writes_again_changes_nothing_of_the_others(tmp_path):
    stores = divide(4, 2)
    train_rows(stores, steps=1)
    write(stores, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_shard(stores[0], str(tmp_path), 0, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("num_ps", [1, 4])
def test_a_first_update_under_way_leaves_a_partitioned_variable_without_slots(tmp_path, num_ps):
    """Some of the parts have had it, the others not: zeros are not where Rprop begins."""
    rprop = describe(torch.optim.Rprop([torch.zeros(1)]), 0)
    before, after, fresh = divide(4, num_ps, rprop), divide(1, 1, rprop), divide(1, 1, rprop)
    place = stored_parts(before[0])[0]
    name = place.variable
    place.arena.apply("rule", place.span, torch.ones(place.spec.size), None)
    write(before, tmp_path)
    assert json.loads((tmp_path / SLOTS_INDEX).read_text())["weight_map"] == {}
    read_shard(after[0], str(tmp_path))
    assert torch.equal(value_of(after, name), value_of(before, name))
    train_rows(after, steps=1)
    train_rows(fresh, steps=1)
    moved = value_of(after, name) - value_of(before, name)
    torch.testing.assert_close(moved, value_of(fresh, name))


def test_a_part_reads_its_rows_only(tmp_path, monkeypatch):
    before = divide(1, 1)
    train_rows(before, steps=1)
    write(before, tmp_path)
    read, carry_out = [], CheckpointFolder.carry_out

    def spy(folder, step):
        carry_out(folder, step)
        if isinstance(step, Read):
            read.append(bytes(step.out))

    monkeypatch.setattr(CheckpointFolder, "carry_out", spy)
    read_shard(divide(2, 3)[1], str(tmp_path))
    table = load_file(tmp_path / "model-00001-of-00001.safetensors")["table"]
    assert bytes(table[5:].numpy()) in read
    assert not [content for content in read if bytes(table[4].numpy()) in content]


def test_v2_05_a_variable_of_another_number_of_rows_is_refused(tmp_path):
    before, after = divide(4, 2), divide(4, 1, shapes={"table": (12, 3), "other/table": (7,)})
    write(before, tmp_path)
    message = refusal(tmp_path, after)
    assert "variable 'table' is float32[10, 3], this model has float32[12, 3]" in message


def test_v2_05_slots_of_another_shape_are_refused(tmp_path):
    before, after = divide(4, 2), divide(2, 1)
    train_rows(before, steps=1)
    write(before, tmp_path)
    index = json.loads((tmp_path / SLOTS_INDEX).read_text())
    index["weight_map"]["table/exp_avg"] = "swapped.safetensors"
    (tmp_path / SLOTS_INDEX).write_text(json.dumps(index))
    save_file({"table/exp_avg": torch.zeros(5, 3)}, tmp_path / "swapped.safetensors")
    message = refusal(tmp_path, after)
    assert "optimizer state of 'table'" in message
    assert "(10, 3) or be a scalar, got (5, 3)" in message


@pytest.mark.parametrize("num_ps", [1, 2])
def test_two_variables_of_one_name_are_refused_not_lost(tmp_path, num_ps):
    stores = place(num_ps, {"w": (2,)}, rule=None)
    other = VariableSpec("w", (3,), "float32")
    assert stores[-1].create_variable(other, 0, torch.zeros(3))
    with pytest.raises(CheckpointError, match="two variables called 'w'"):
        write(stores, tmp_path)


def test_a_program_s_own_variables_are_saved_and_restored(tmp_path):
    stores = place(1)
    (own,) = part_specs("own", (4,), 1)
    assert stores[0].create_variable(own, 0, torch.arange(4.0))
    write(stores, tmp_path)
    after = place(1)
    after[0].create_variable(own, 0, torch.zeros(4))
    read_shard(after[0], str(tmp_path))
    assert after[0].variable("own").values.tolist() == [0, 1, 2, 3]


# --- while training goes on


def begin_to_write(store, directory):
    """A save that has written its first header; the rest of it."""
    folder, steps = CheckpointFolder(directory), save.write_shard(store, 0, 1)
    folder.carry_out(next(steps))

    def finish():
        with folder:
            shard = folder.run(steps)
        for name, entries in ((VALUES_INDEX, shard.weight_map), (SLOTS_INDEX, shard.slot_map)):
            (directory / name).write_text(json.dumps({"weight_map": entries}))
        return shard

    return finish


@pytest.mark.parametrize("shards", [1, 3])
def test_slots_that_a_first_update_makes_during_a_save_are_saved_with_its_values(tmp_path, shards):
    (before,), (after,) = divide(shards, 1), divide(shards, 1)
    finish = begin_to_write(before, tmp_path)
    train_rows([before], steps=1)
    shard = finish()
    assert shard.slot_map["bias/exp_avg"] == "optimizer-00001-of-00001-later.safetensors"
    assert shard.nbytes == sum(tensor.nbytes for tensor in held([before]).values()) - (shards - 1) * 4 * 2
    read_shard(after, tmp_path)
    torch.testing.assert_close(state_of([after]), state_of([before]), rtol=0, atol=0, equal_nan=True)


def test_a_first_update_that_is_under_way_during_a_save_leaves_no_slots(tmp_path):
    """It has reached the first block of the variable, and will reach the second one after the save has passed it."""
    (store,) = place(1, {"large": (2 * BLOCK,), "small": (3,)})
    arena, ones = store.arenas[0], torch.ones(BLOCK)
    finish = begin_to_write(store, tmp_path)
    arena.apply("rule", (0, BLOCK), ones, None)
    arena.apply("rule", arena.layout.ranges[1], ones[:3], None)
    assert set(finish().slot_map) == {"small/step", "small/exp_avg", "small/exp_avg_sq"}


def test_updates_during_a_save_are_in_it_by_whole_blocks(tmp_path):
    (store,) = place(1, {"large": (2 * BLOCK,)})
    train([store], steps=1)
    finish, (arena, *_) = begin_to_write(store, tmp_path), store.arenas
    before = arena.values.clone()
    arena.apply("rule", (BLOCK, 2 * BLOCK), torch.ones(BLOCK), None)
    shard = finish()
    values = load_file(tmp_path / shard.weight_map["large"])["large"]
    slots = load_file(tmp_path / shard.slot_map["large/exp_avg"])
    assert torch.equal(values, arena.values)
    assert not torch.equal(values, before)
    assert torch.equal(slots["large/exp_avg"], state_at(stored_parts(store)[0])["exp_avg"])


def test_a_save_takes_memory_for_a_block_only(tmp_path, monkeypatch):
    (store,) = place(1, {"large": (5 * BLOCK,)})
    train([store], steps=1)
    copies = []
    monkeypatch.setattr(save, "BlockCopy", lambda: copies.append(BlockCopy()) or copies[-1])
    write([store], tmp_path)
    (copy,) = copies
    assert sum(memory.nbytes for memory in copy._memory.values()) == 3 * BLOCK * 4 + BLOCK * 8  # and the counter
    assert 0 < copy.longest < copy.pause


# --- what can be wrong


def refusal(directory, stores=None):
    (store,) = stores or place(1)
    with pytest.raises(CheckpointError) as caught:
        read_shard(store, str(directory))
    assert caught.value.path.startswith(str(directory))
    return str(caught.value)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"])
@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_named(checkpoint, file, size):
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[:size])
    message = refusal(checkpoint)
    assert file in message
    assert "cut short" in message


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", VALUES_INDEX, SLOTS_INDEX])
def test_a_file_that_is_missing_is_named(checkpoint, file):
    (checkpoint / file).unlink()
    assert file in refusal(checkpoint)


@pytest.mark.parametrize("name", [VALUES_INDEX, SLOTS_INDEX])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {"b": 3}}', "\xff"])
def test_an_index_that_is_none_is_named(checkpoint, name, text):
    (checkpoint / name).write_text(text, encoding="latin-1")
    assert name in refusal(checkpoint)


def test_an_index_that_names_the_wrong_file_is_refused(checkpoint):
    index = json.loads((checkpoint / VALUES_INDEX).read_text())
    index["weight_map"]["0.bias"] = "model-00001-of-00002.safetensors"
    (checkpoint / VALUES_INDEX).write_text(json.dumps(index))
    assert "0.bias" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("shapes", "variable"),
    [({**SHAPES, "3.weight": (1,)}, "3.weight"), ({**SHAPES, "0.weight": (4, 8)}, "0.weight")],
    ids=["another name", "another shape"],
)
def test_a_checkpoint_of_another_model_names_the_variable(checkpoint, shapes, variable):
    message = refusal(checkpoint, place(1, shapes))
    assert repr(variable) in message
    assert "another model" in message


@pytest.mark.parametrize("rule", [ADAGRAD, None], ids=["Adagrad", "frozen"])
def test_a_checkpoint_of_another_optimizer_names_the_variable(checkpoint, rule):
    message = refusal(checkpoint, place(1, rule=rule))
    assert "0.weight" in message
    assert "another optimizer" in message


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    store = place(1)[0]
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors") as caught:
        write_shard(store, str(tmp_path / "missing"), 0, 1)
    assert str(tmp_path / "missing") in caught.value.path


# --- what is not finite


def spoil(store, variable, index, value, slot=""):
    """Put a value into a variable, or into a slot of it."""
    (where,) = [each for each in stored_parts(store) if each.spec.name == variable]
    if not slot:
        where.arena.values[where.span[0] + index] = value
        return
    for start, stop, state in where.arena._rules[0].slots():
        if start <= where.span[0] < stop:
            state[slot][where.span[0] + index - start] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("slot", ["", "exp_avg", "exp_avg_sq"])
def test_cp_what_is_not_finite_is_not_written_and_is_named(tmp_path, value, slot):
    store = place(1)[0]
    train([store])
    spoil(store, "2.weight", 11, value, slot)
    what = f"slot '{slot}' of variable '2.weight'" if slot else "variable '2.weight'"
    with pytest.raises(NotFiniteError, match=rf"^{what} on ps:0 is {value} at \[1, 3\]") as caught:
        write_shard(store, str(tmp_path), 0, 1)
    assert caught.value.variable == "2.weight"


def test_cp_the_whole_variable_is_named_and_the_row_in_it(tmp_path):
    store = Store("ps:1", private_store_memory)
    part = VariableSpec("table/part_1", (4, 2), "float32", Shard("table", 1, 6, 10))
    store.create([ArenaLayout("float32", ADAGRAD, (part,))])
    train([store])
    spoil(store, "table/part_1", 5, float("nan"))
    with pytest.raises(NotFiniteError, match=r"variable 'table' on ps:1 is nan at \[8, 1\]"):
        write_shard(store, str(tmp_path), 1, 2)


def test_cp_a_block_that_is_not_the_first_is_looked_at(tmp_path):
    store = place(1, {"a": (BLOCK,), "b": (BLOCK - 7, 3)}, rule=ADAGRAD)[0]
    train([store])
    spoil(store, "b", BLOCK * 2 + 1, float("nan"))
    with pytest.raises(NotFiniteError, match=rf"'b' on ps:0 is nan at \[{(BLOCK * 2 + 1) // 3}, "):
        write_shard(store, str(tmp_path), 0, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_cp_large_values_whose_sum_is_none_are_written(tmp_path, dtype):
    store = Store("ps:0", private_store_memory)
    store.create([layout({"a": (4, 8)}, ADAGRAD, dtype)])
    train([store])
    store.arenas[0].values.fill_(torch.finfo(store.arenas[0].values.dtype).max)
    assert write_shard(store, str(tmp_path), 0, 1).weight_map


def test_cp_a_first_value_that_is_nan_is_refused_before_the_first_update(tmp_path):
    store = place(1)[0]
    spoil(store, "0.bias", 2, float("nan"))
    with pytest.raises(NotFiniteError, match=r"variable '0.bias' on ps:0 is nan at \[2\]"):
        write_shard(store, str(tmp_path), 0, 1)


@pytest.mark.parametrize("rule", [None, ADAGRAD])
def test_cp_what_nobody_trains_may_hold_anything(tmp_path, rule):
    """A mask of -inf, the best loss so far; or a frozen parameter, although an optimizer holds it."""
    store = Store("ps:0", private_store_memory)
    store.create([layout({"mask": (4, 8)}, rule), layout({"a": (4,)}, ADAGRAD)])
    train([store]) if rule is None else store.arenas[1].apply("rule", (0, 4), torch.ones(4), None)
    store.arenas[0].values.fill_(-float("inf"))
    assert write_shard(store, str(tmp_path), 0, 1).weight_map
