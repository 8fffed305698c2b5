"""Memory in huge pages, and memory that is as good where there are none."""

import contextlib
import mmap
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import Rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory import arena_memory, huge_pages, shared_file
from paramserver.memory.huge_pages import SIZE, map_file, take, zeros
from paramserver.store.tables.row_rule import RowRule

READ, WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
SHARED_MEMORY = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="maps files of Linux")


@contextlib.contextmanager
def a_file(nbytes):
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, nbytes)
        yield descriptor
    finally:
        os.close(descriptor)


def mappings():
    """Of this process: the lines about each, by its first address."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return {int(part.split("-")[0], 16): part for part in parts if part}


def bytes_of(field, data):
    return int(re.search(rf"^{field}:\s+(\d+) kB", mappings()[data.data_ptr()], re.MULTILINE)[1]) * 1024


def makes_huge_pages():
    """From Linux 6.1 on, unless they are forbidden."""
    is_new = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 1)
    return is_new and SHARED_MEMORY.exists() and "[deny]" not in SHARED_MEMORY.read_text()


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (SIZE // 4,), (SIZE // 16, 4), (SIZE, 1), (SIZE // 4 + 1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_are_those_of_torch(shape, dtype):
    found = zeros(shape, dtype)
    assert torch.equal(found, torch.zeros(shape, dtype=dtype))
    assert found.dtype is dtype
    assert found.is_contiguous()
    found += 1
    assert bool((found == 1).all())


def test_zeros_that_are_large_begin_with_a_huge_page():
    assert zeros((SIZE,), torch.float32).data_ptr() % SIZE == 0


def test_zeros_are_saved_without_what_lies_around_them(tmp_path):
    torch.save(zeros((SIZE // 4 + 1,), torch.float32), tmp_path / "zeros.pt")
    assert (tmp_path / "zeros.pt").stat().st_size < SIZE + 4096


@on_linux
@pytest.mark.parametrize("nbytes", [4096, SIZE, 3 * SIZE + 4096])
@pytest.mark.parametrize("advice", [huge_pages._MADV_COLLAPSE, 9999])  # the other is not known to any system
def test_a_file_is_shared_by_all_who_map_it(monkeypatch, nbytes, advice):
    monkeypatch.setattr(huge_pages, "_MADV_COLLAPSE", advice)
    with a_file(nbytes) as descriptor:
        data = map_file(descriptor, nbytes, WRITE)
        take(data)
        other = map_file(descriptor, nbytes, READ)
    assert data.shape == other.shape == (nbytes,)
    assert data.data_ptr() % SIZE == other.data_ptr() % SIZE == 0
    assert not other.any()
    data.copy_(torch.arange(nbytes) % 251)
    assert torch.equal(other, (torch.arange(nbytes) % 251).byte())


@on_linux
@pytest.mark.skipif(not makes_huge_pages(), reason="the system has no huge pages for shared memory")
def test_what_was_taken_lies_in_huge_pages_for_all_who_map_it():
    with a_file(2 * SIZE + 4096) as descriptor:
        data = map_file(descriptor, 2 * SIZE + 4096, WRITE)
        take(data)
        other = map_file(descriptor, 2 * SIZE + 4096, READ)
    assert bytes_of("ShmemPmdMapped", data) == 2 * SIZE
    assert not other.any()
    assert bytes_of("ShmemPmdMapped", other) == 2 * SIZE


@on_linux
@pytest.mark.skipif(not makes_huge_pages(), reason="the system has no huge pages for shared memory")
def test_values_of_a_ps_lie_in_huge_pages_and_what_may_never_be_pushed_takes_none():
    layouts = [ArenaLayout("float32", None, (VariableSpec("words", (SIZE, 1), "float32"),), is_table=True)]
    values = arena_memory.shared_store_memory(layouts).file.data
    assert bytes_of("ShmemPmdMapped", values) == SIZE * (arena_memory.store_bytes(layouts) // SIZE) > 0
    pushed = shared_file.SharedFile.create(arena_memory.rows_bytes(layouts)).data
    assert bytes_of("Rss", pushed) == 0


def test_slots_of_a_large_table_begin_with_a_huge_page():
    rule = RowRule(Rule("Adagrad", {"lr": 1.0}), torch.zeros(SIZE // 4, 1))
    rule.update(np.array([1]), torch.ones(1, 1), {}).apply()
    assert rule.state(0, 1)["sum"].data_ptr() % SIZE == 0


@on_linux
def test_a_file_is_mapped_as_long_as_its_tensor_lives():
    with a_file(SIZE) as descriptor:
        data = map_file(descriptor, SIZE, READ)
    part, address = data[5:9], data.data_ptr()
    del data
    assert address in mappings()
    del part
    assert address not in mappings()


@on_linux
def test_what_cannot_be_mapped_is_an_error_and_leaves_nothing():
    reader, writer = os.pipe()
    before = len(mappings())
    with pytest.raises(OSError, match="No such device"):
        map_file(reader, SIZE, READ)
    assert len(mappings()) <= before
    os.close(reader)
    os.close(writer)
