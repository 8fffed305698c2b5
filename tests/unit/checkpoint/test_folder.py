"""The folder of a checkpoint: what is written by several tasks is one file, and what is wrong is named."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.patience import patience

from paramserver.checkpoint import folder as checkpoint_folder
from paramserver.checkpoint.folder import CheckpointFolder, Read, Write, read_header
from paramserver.checkpoint.tensor_file import TensorSpec, lay_out
from paramserver.errors import CheckpointError
from paramserver.layout.variables import DTYPES
from paramserver.memory.arena_memory import tensor_bytes

WHOLE = {
    "w": torch.arange(30.0).view(10, 3),
    "w/flags": torch.arange(10) % 3 == 0,
    "w/half": torch.arange(20).view(10, 2).bfloat16(),
    "w/step": torch.tensor(7, dtype=torch.int64),
}
FILE = "w.safetensors"


def specs(tensors):
    return {
        name: TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def rows(start, stop, tensors=WHOLE, *, is_shared=True):
    """The steps of a task that holds the rows ``[start, stop)`` of all tensors; the first one has the scalars."""
    layout = lay_out(specs(tensors))
    yield Write(FILE, layout.size, is_shared, 0, memoryview(layout.header))
    for name, tensor in tensors.items():
        part = tensor[start:stop] if tensor.ndim else tensor.reshape(1)[: int(start == 0)]
        skipped = start * tensor[:1].nbytes if tensor.ndim else 0
        content = tensor_bytes(part.reshape(-1))
        yield Write(FILE, layout.size, is_shared, layout.begins[name] + skipped, content)


def write(path, steps):
    with CheckpointFolder(path) as folder:
        folder.run(steps)


def check(path):
    found = load_file(path / FILE)
    assert found.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("order", [[(0, 10)], [(0, 4), (4, 10)], [(7, 10), (3, 7), (0, 3), (3, 7)]])
def test_b06_rows_of_several_make_one_tensor(tmp_path, order):
    for part in order:
        write(tmp_path, rows(*part))
    check(tmp_path)


def test_b06_rows_may_be_written_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(10) as pool:
        for _ in pool.map(lambda row: write(tmp_path, rows(row, row + 1)), range(10)):
            pass
    check(tmp_path)


def test_rows_that_nobody_has_written_yet_are_zero(tmp_path):
    write(tmp_path, rows(0, 4))
    found = load_file(tmp_path / FILE)
    assert torch.equal(found["w"][:4], WHOLE["w"][:4])
    assert not found["w"][4:].any()


def test_a_write_and_a_read_that_are_done_in_part_go_on(tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr("os.pwrite", lambda file, content, offset: pwrite(file, content[:7], offset))
    write(tmp_path, rows(0, 10))
    check(tmp_path)
    monkeypatch.setattr("os.preadv", lambda file, outs, offset: preadv(file, [outs[0][:7]], offset))
    out = bytearray((tmp_path / FILE).stat().st_size)
    write(tmp_path, iter_steps(Read(FILE, 0, memoryview(out))))
    assert bytes(out) == (tmp_path / FILE).read_bytes()


def iter_steps(*steps):
    yield from steps


def test_a_large_read_is_shared_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "SHARE_BYTES", 100)
    content = bytes(range(256)) * 4
    (tmp_path / FILE).write_bytes(content)
    out, preadv, threads = bytearray(1000), os.preadv, set()
    both = threading.Barrier(checkpoint_folder.THREADS, timeout=patience(10))

    def meet_and_read(file, outs, offset):
        if offset < 13 + 2 * 100:
            both.wait()
        threads.add(threading.get_ident())
        return preadv(file, outs, offset)

    monkeypatch.setattr("os.preadv", meet_and_read)
    write(tmp_path, iter_steps(Read(FILE, 13, memoryview(out))))
    assert out == content[13:1013]
    assert len(threads) == checkpoint_folder.THREADS == 2


def test_nobody_reads_any_more_when_a_large_read_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "SHARE_BYTES", 10)
    (tmp_path / FILE).write_bytes(bytes(10_000))
    preadv, begun = os.preadv, []

    def fail_at_once(file, outs, offset):
        begun.append(offset)
        if offset == 0:
            raise OSError("the disk is gone")
        return preadv(file, outs, offset)

    monkeypatch.setattr("os.preadv", fail_at_once)
    with CheckpointFolder(tmp_path) as folder:
        with pytest.raises(CheckpointError, match="w.safetensors cannot be read: the disk is gone"):
            folder.carry_out(Read(FILE, 0, memoryview(bytearray(10_000))))
        assert sorted(begun) == list(range(0, 10_000, 10))


def test_what_is_written_goes_to_the_disk_while_more_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "FLUSH_BYTES", 10)
    fsync, go_on, flushed = os.fsync, threading.Event(), []

    def flush_when_told(file):
        assert go_on.wait(10)
        flushed.append(fsync(file))

    monkeypatch.setattr("os.fsync", flush_when_told)
    with CheckpointFolder(tmp_path) as folder:
        folder.carry_out(Write("a", 20, False, 0, memoryview(bytes(11))))
        folder.carry_out(Write("a", 20, False, 11, memoryview(bytes(9))))
        assert not flushed
        go_on.set()
    assert len(flushed) == 2


def test_what_cannot_be_brought_to_the_disk_is_an_error_of_a_later_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "FLUSH_BYTES", 10)
    fsync, failures = os.fsync, [OSError("the disk is full")]

    def fail_once(file):
        if failures:
            raise failures.pop()
        fsync(file)

    monkeypatch.setattr("os.fsync", fail_once)
    with CheckpointFolder(tmp_path) as folder:
        folder.carry_out(Write("a", 40, False, 0, memoryview(bytes(11))))
        with pytest.raises(CheckpointError, match="/a failed: the disk is full"):
            folder.carry_out(Write("a", 40, False, 11, memoryview(bytes(11))))


def test_many_files_may_be_written_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "MAX_OPEN_FILES", 2)
    with CheckpointFolder(tmp_path) as folder:
        for offset in range(3):
            for name in "abcde":
                folder.carry_out(Write(name, 3, False, offset, memoryview(name.encode())))
        outs = {name: bytearray(3) for name in "abcde"}
        for name, out in outs.items():
            folder.carry_out(Read(name, 0, memoryview(out)))
    assert {name: bytes(out).decode() for name, out in outs.items()} == {name: name * 3 for name in "abcde"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_a_ps_can_be_written(tmp_path, dtype):
    tensor = torch.arange(4).to(DTYPES[dtype])
    write(tmp_path, rows(0, 4, {"t": tensor}, is_shared=False))
    assert torch.equal(load_file(tmp_path / FILE)["t"], tensor)
    with CheckpointFolder(tmp_path) as folder:
        assert folder.run(read_header(str(tmp_path), FILE))["t"].spec == TensorSpec(dtype, (4,))


def test_each_tensor_is_aligned_for_its_dtype():
    layout = lay_out(specs(WHOLE))
    assert len(layout.header) % 8 == 0
    assert not any(begin % WHOLE[name].element_size() for name, begin in layout.begins.items())


def test_what_safetensors_writes_is_read(tmp_path):
    save_file(WHOLE, tmp_path / FILE, metadata={"format": "pt"})
    with CheckpointFolder(tmp_path) as folder:
        found = folder.run(read_header(str(tmp_path), FILE))
    assert {name: tensor.spec for name, tensor in found.items()} == specs(WHOLE)


# --- what can be wrong


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32", "shape": [2]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"w": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"\xff\xfe",
    ],
)
def test_a_header_that_is_none_is_named(tmp_path, text):
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    with CheckpointFolder(tmp_path) as folder, pytest.raises(CheckpointError, match="was it cut short") as caught:
        folder.run(read_header(str(tmp_path), FILE))
    assert caught.value.path == str(tmp_path / FILE)


def test_a_header_of_an_impossible_length_takes_no_memory(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff" * 8)
    with CheckpointFolder(tmp_path) as folder, pytest.raises(CheckpointError, match="its header would have"):
        folder.run(read_header(str(tmp_path), FILE))


def test_b01_a_large_read_of_a_file_that_is_cut_short_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "SHARE_BYTES", 10)
    (tmp_path / FILE).write_bytes(bytes(95))
    message = "it ends at byte 95, 5 bytes before it should"
    with CheckpointFolder(tmp_path) as folder, pytest.raises(CheckpointError, match=message) as caught:
        folder.carry_out(Read(FILE, 0, memoryview(bytearray(100))))
    assert caught.value.path == str(tmp_path / FILE)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    message = "writing the checkpoint file .*w.safetensors failed: .*model_dir"
    with CheckpointFolder(tmp_path / "none") as folder, pytest.raises(CheckpointError, match=message) as caught:
        folder.run(rows(0, 10))
    assert caught.value.path == str(tmp_path / "none" / FILE)


@pytest.mark.parametrize("name", ["../w", "/etc/passwd", "a/b", "", ".", ".."])
def test_no_file_outside_of_the_folder_is_touched(tmp_path, name):
    with CheckpointFolder(tmp_path) as folder:
        for step in (Read(name, 0, memoryview(bytearray(1))), Write(name, 1, False, 0, memoryview(b"1"))):
            with pytest.raises(CheckpointError, match="is not the name of a file in checkpoint"):
                folder.carry_out(step)
