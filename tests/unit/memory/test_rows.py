"""Rows of a table, as torch's own indexing has them."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import torch

from paramserver import memory
from paramserver.memory import rows
from paramserver.memory.rows import FETCHED, Rows, add_up, loops_for

IDS = np.array([0, 3, 4])

shapes = pytest.mark.parametrize("width", [1, 3, 16])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True, params=["NumPy", "loops"])
def size_of_tables(request, monkeypatch):
    """Whether a table counts as large."""
    monkeypatch.setattr(rows, "LARGE", 0 if request.param == "loops" else 1 << 62)


def table_of(width, dtype):
    return torch.arange(5 * width).view(5, width).to(dtype)


@shapes
@dtypes
def test_rows_are_taken(width, dtype):
    table = table_of(width, dtype)
    rows, out = Rows(table), torch.empty(3, width, dtype=dtype)
    assert torch.equal(rows.take(IDS), table[torch.from_numpy(IDS)])
    assert rows.take(IDS, out) is out
    assert torch.equal(out, table[torch.from_numpy(IDS)])


@pytest.mark.parametrize("count", [FETCHED, FETCHED + 1, 3 * FETCHED])
def test_many_rows_are_taken(count):
    table = torch.arange(8.0 * FETCHED).view(-1, 2)
    ids = np.random.default_rng(0).permutation(len(table))[:count]
    assert torch.equal(Rows(table).take(ids), table[torch.from_numpy(ids)])


@shapes
@dtypes
def test_rows_are_put_and_the_others_stay(width, dtype):
    table = table_of(width, dtype)
    expected, values = table.clone(), torch.full((width, 3), -1, dtype=dtype).T
    expected[torch.from_numpy(IDS)] = values
    Rows(table).put(IDS, values)
    assert torch.equal(table, expected)


@pytest.mark.parametrize("shape", [(5, 2), (5, 0), (0, 2)])
def test_no_rows_and_empty_tables(shape):
    rows, none = Rows(torch.ones(shape)), np.empty(0, np.int64)
    assert rows.take(none).shape == (0, shape[1])
    rows.put(none, torch.empty(0, shape[1]))


@pytest.mark.parametrize("count", [0, 1, 7, 100])
@shapes
def test_rows_are_added_up_in_their_order(width, count):
    generator = np.random.default_rng(0)
    table = torch.from_numpy(generator.standard_normal((50, width), dtype=np.float32))
    places = generator.integers(0, 50, count)
    numbers = np.cumsum(generator.integers(0, 2, count)) if count else np.empty(0, dtype=np.int64)
    numbers -= numbers[:1].sum()  # the first is 0
    expected = torch.zeros(int(numbers.max(initial=-1)) + 1, width)
    for place, number in zip(places, numbers, strict=True):
        expected[number] += table[place]
    assert torch.equal(add_up(table, places, numbers, loops_for(0, torch.float32)), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole[:, :12].view(5, 4, 3),
        lambda whole: whole[:, 1:13].view(5, 4, 3),
        lambda whole: whole[:1, :12].view(1, 4, 3),
        lambda whole: whole[:, :12].view(5, 3, 4).transpose(1, 2)[..., :3],
        lambda whole: whole[:1, :12].view(1, 4, 3).expand(5, 4, 3),
        lambda whole: whole[:1, :1].expand(5, 4, 3),
        lambda whole: whole[:, :15].reshape(5, 5, 3)[:, :4],
        lambda whole: whole[::2, :12].unflatten(1, (4, 3)),
        lambda whole: whole[:, :12].view(5, 2, 2, 3),
        lambda whole: whole[:0, :12].view(0, 4, 3),
    ],
)
def test_rows_are_added_up_from_where_they_lie(view):
    """The gradient of a part of what was put side by side has gaps."""
    rows_of = view(torch.arange(75.0).view(5, 15))
    plain = rows_of.reshape(-1, 3)
    places = np.random.default_rng(0).integers(0, max(len(plain), 1), 3 * len(plain))
    numbers = np.arange(len(places)) // 2
    expected = add_up(plain, places, numbers)
    assert torch.equal(add_up(rows_of, places, numbers, loops_for(0, torch.float32)), expected)


def test_there_are_loops_for_large_tables_of_numbers_that_they_know(monkeypatch):
    monkeypatch.setattr(rows, "LARGE", 100)
    assert loops_for(100, torch.float32) is loops_for(101, torch.float64) is not None
    assert loops_for(99, torch.float32) is None
    assert loops_for(100, torch.bfloat16) is None


def test_without_numba_there_are_none_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(rows, "LARGE", 0)
    monkeypatch.setattr(rows, "_row_loops", functools.cache(rows._row_loops.__wrapped__))
    monkeypatch.delattr(memory, "row_loops", raising=False)
    monkeypatch.setitem(sys.modules, "paramserver.memory.row_loops", None)
    caplog.set_level("INFO")
    assert loops_for(1, torch.float32) is loops_for(1, torch.float32) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "the extra 'numba'" in caplog.text
    table = table_of(3, torch.float32)
    assert torch.equal(Rows(table).take(IDS), table[torch.from_numpy(IDS)])


def test_on_other_devices_torch_copies():
    rows = Rows(torch.empty(5, 2, device="meta"))
    assert rows.take(IDS).device.type == "meta"
    rows.put(IDS, torch.ones(3, 2, device="meta"))


@pytest.mark.parametrize("values", [torch.ones(3, 3), torch.ones(2, 2), torch.ones(3, 2, dtype=torch.float64)])
def test_what_are_not_as_many_rows_of_the_table_is_refused(values):
    table = torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"putting 3 rows of 2 elements of torch.float32: got"):
        Rows(table).put(IDS, values)
    assert not table.any()
