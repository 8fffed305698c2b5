"""The files of a checkpoint: the index, the tensors, and what is said when they are damaged."""

import json
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save_file

from paramserver.checkpoint.index import VALUES_INDEX, Maps, digest, merge_maps, read_index, rows_files, write_index
from paramserver.checkpoint.reading import read_shapes, read_tensors, stored_tensors
from paramserver.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path):
    save_file({name: TENSORS[name] for name in "ab"}, tmp_path / "one.safetensors")
    save_file({"n": TENSORS["n"]}, tmp_path / "two.safetensors")
    write_index(
        tmp_path / VALUES_INDEX, {"a": "one.safetensors", "n": "two.safetensors", "b": "one.safetensors"}, step=7
    )
    return tmp_path


def test_an_index_is_as_hugging_face_has_it(folder):
    index = json.loads((folder / VALUES_INDEX).read_text())
    assert index["metadata"] == {"step": 7}
    assert index["weight_map"] == read_index(folder / VALUES_INDEX)


def test_tensors_come_back(folder):
    found = dict(read_tensors(folder, read_index(folder / VALUES_INDEX)))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_shapes_are_read_without_values(folder):
    shapes = read_shapes(folder, read_index(folder / VALUES_INDEX))
    assert sorted(shapes) == [("a", "float32", (2, 3)), ("b", "bfloat16", (2,)), ("n", "int64", ())]


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"metadata": {}}', b"\xff\xfe"]
)
def test_what_is_no_index_is_refused(tmp_path, text):
    path = tmp_path / VALUES_INDEX
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"{path} is not an index of a checkpoint") as caught:
        read_index(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("kept_bytes", [0, 4, 40, -1])
@pytest.mark.parametrize("read", [read_tensors, read_shapes])
def test_a_file_that_is_cut_short_is_named(folder, kept_bytes, read):
    file = folder / "one.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=f"{file} cannot be read: .*; was it cut short"):
        list(read(folder, {"a": "one.safetensors"}))


@pytest.mark.parametrize("weight_map", [{"missing": "one.safetensors"}, {"a": "gone.safetensors"}])
def test_what_an_index_promises_and_nobody_has_is_an_error(folder, weight_map):
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_tensors(folder, weight_map))


def test_an_index_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="writing the index .* failed"):
        write_index(tmp_path / "no folder" / VALUES_INDEX, {})


def test_some_rows_are_read_without_the_others(tmp_path):
    tensors = {"w": torch.arange(30.0).view(10, 3), "w/step": torch.tensor(7)}
    save_file(tensors, tmp_path / "w.safetensors")
    found = {
        tensor.name: tensor.read((4, 6))
        for tensor in stored_tensors(tmp_path, dict.fromkeys(("w", "w/step"), "w.safetensors"))
    }
    assert torch.equal(found["w"], tensors["w"][4:6])
    assert found["w/step"] == 7


def test_the_digest_tells_checkpoints_apart(folder, tmp_path):
    one = digest(folder)
    assert one == digest(folder) != ""
    write_index(folder / VALUES_INDEX, {}, id="another")
    assert digest(folder) not in (one, "")
    assert digest(tmp_path / "nothing") == ""


@pytest.mark.parametrize("name", ["w", "a/b.c", "größe", "..", "a b", "%2F", "00001-of-00002", "A*?"])
def test_names_of_files_are_of_one_variable_only(name):
    for prefix, file in zip(("model", "optimizer"), rows_files(name), strict=True):
        stem = file.removeprefix(f"{prefix}-").removesuffix(".safetensors")
        assert unquote(stem) == name
        assert not set("/-*?") & set(stem)


def test_names_of_any_length_have_files_that_a_file_system_takes(tmp_path):
    names = [character * length + end for character in "aA%ß" for length in (85, 250, 1000) for end in "xy"]
    files = [file for name in names for file in rows_files(name)]
    assert len(set(files)) == len(files)
    for file in files:
        (tmp_path / f"{file}.partial").touch()


def test_names_that_differ_in_capitals_alone_have_files_that_differ_otherwise():
    names = ["weight", "Weight", "WEIGHT", "w%57", "w%2d", "w-", "w%2D"]
    files = [rows_files(name)[0].casefold() for name in names]
    assert len(set(files)) == len(files)


# --- what several have written


ONE = Maps({"t": "t.values", "b": "1"}, {"t/m": "t.slots", "t/v": "t.slots", "b/m": "s1"})


def test_b06_equal_entries_are_one():
    other = Maps({"t": "t.values", "c": "2"}, {"t/m": "t.slots", "t/v": "t.slots"})
    assert merge_maps([ONE, other]) == Maps({"t": "t.values", "b": "1", "c": "2"}, dict(ONE.slot_map))


@pytest.mark.parametrize("slots", [{}, {"t/m": "t.slots"}, {"t/m": "t.slots", "t/v": "t.slots", "t/x": "t.slots"}])
@pytest.mark.parametrize("turn", [1, -1])
def test_b06_slots_that_not_all_parts_have_do_not_count(slots, turn):
    assert merge_maps([ONE, Maps({"t": "t.values"}, slots)][::turn]).slot_map == {"b/m": "s1"}


def test_two_variables_of_one_name_are_an_error():
    with pytest.raises(CheckpointError, match="two variables called 'b'.*another name") as caught:
        merge_maps([ONE, Maps({"b": "2"}, {})])
    assert caught.value.path == "2"
