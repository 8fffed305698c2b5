"""Safetensors files in memory: what is written can be read, whoever writes which piece of it."""

from __future__ import annotations

import pytest
import torch

from paramserver.checkpoint.folder import Read, Write
from paramserver.checkpoint.memory_files import MemoryFiles
from paramserver.checkpoint.tensor_file import TensorSpec, lay_out
from paramserver.errors import CheckpointError
from paramserver.memory.arena_memory import tensor_bytes

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
    "step": torch.tensor(3.0),
    "weight": torch.arange(12, dtype=torch.float64).view(3, 4),
}
LAYOUT = lay_out({name: TensorSpec(str(each.dtype)[6:], tuple(each.shape)) for name, each in TENSORS.items()})


def written(offset: int, content: bytes) -> Write:
    return Write("file", LAYOUT.size, False, offset, memoryview(content))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_is_written_in_pieces_is_there(size: int) -> None:
    files = MemoryFiles()
    files.add("other", TENSORS)
    whole = bytearray(LAYOUT.size)
    files.carry_out(Read("other", 0, memoryview(whole)))
    assert whole.startswith(LAYOUT.header)
    for begin in range(0, len(LAYOUT.header), size):
        files.carry_out(written(begin, LAYOUT.header[begin : begin + size]))
    for name, begin in LAYOUT.begins.items():
        content = bytes(whole[begin : begin + TENSORS[name].nbytes])
        for at in range(0, len(content), size):
            files.carry_out(written(begin + at, content[at : at + size]))
    for name, tensor in TENSORS.items():
        found = files.tensor("file", name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert found.untyped_storage().nbytes() == tensor.nbytes


def test_a_second_header_changes_nothing() -> None:
    files = MemoryFiles()
    files.carry_out(written(0, LAYOUT.header))
    files.carry_out(written(LAYOUT.begins["weight"], bytes(tensor_bytes(TENSORS["weight"]))))
    files.carry_out(written(0, LAYOUT.header))
    assert torch.equal(files.tensor("file", "weight"), TENSORS["weight"])


def test_what_is_read_is_the_memory_itself() -> None:
    files, weight = MemoryFiles(), torch.zeros(4)
    files.add("file", {"weight": weight})
    weight += 1
    out = torch.empty(2)
    files.carry_out(
        Read("file", lay_out({"weight": TensorSpec("float32", (4,))}).begins["weight"] + 8, tensor_bytes(out))
    )
    assert out.tolist() == [1, 1]


def test_what_is_not_there_is_said() -> None:
    files = MemoryFiles()
    files.carry_out(written(0, LAYOUT.header))
    with pytest.raises(CheckpointError, match=r"expected 'bias' among .*'flags'"):
        files.tensor("file", "bias")
    with pytest.raises(CheckpointError, match="expected a file of"):
        files.carry_out(Read("none", 0, memoryview(bytearray(1))))
    with pytest.raises(CheckpointError, match="header"):
        files.carry_out(Write("bad", 100, False, 0, memoryview(b"12345678")))
