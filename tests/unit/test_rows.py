"""Rows of a table, as torch's own indexing has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paramserver.rows import FETCHED, Rows

IDS = np.array([0, 3, 4])

shapes = pytest.mark.parametrize("width", [1, 3, 16])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


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
