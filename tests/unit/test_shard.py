"""Shards of checkpoints: into any number of ps tasks, into plain PyTorch, and what is wrong with a broken one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paramserver.arena import BLOCK, ArenaLayout, VariableSpec
from paramserver.errors import CheckpointError
from paramserver.rules import describe
from paramserver.store.shard import SLOTS_INDEX, VALUES_INDEX, read_shard, write_shard
from paramserver.store.store import Store
from paramserver.transport.memory import private_store_memory

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


def write(stores, directory):
    """A whole checkpoint: the shards, and the indexes that the chief writes beside them."""
    shards = [write_shard(store, str(directory), index, len(stores)) for index, store in enumerate(stores)]
    for name, maps in ((VALUES_INDEX, "weight_map"), (SLOTS_INDEX, "slot_map")):
        merged = {key: file for shard in shards for key, file in getattr(shard, maps).items()}
        (directory / name).write_text(json.dumps({"weight_map": merged}))
    return shards


def held(stores):
    """Values and slots of all variables, flat, by name."""
    found = {}
    for store in stores:
        for arena in store.arenas:
            values, runs = arena.snapshot()
            for variable, (start, stop) in zip(arena.layout.variables, arena.layout.ranges, strict=True):
                found[variable.name] = values[start:stop]
                for first, last, state in runs:
                    if first <= start and stop <= last:
                        for name, slot in state.items():
                            found[f"{variable.name}/{name}"] = slot[start - first : stop - first] if slot.ndim else slot
    return found


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
