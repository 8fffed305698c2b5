"""Datasets of arrays on the worker's host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import paramserver as ps


def replicas(count: int) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(count)])


def test_rows_have_the_nest_of_the_arrays() -> None:
    """I15."""
    arrays = {"x": np.arange(6.0).reshape(3, 2), "more": (np.array([1, 2, 3]), torch.tensor([True, False, True]))}
    data = replicas(1).make_numpy_dataset(arrays)
    assert len(data) == 3
    row = data[2]
    assert row["x"].tolist() == [4.0, 5.0]
    assert [part.tolist() for part in row["more"]] == [3, True]
    assert row["x"].dtype == torch.float64


def test_rows_in_batches_over_replicas_and_epochs() -> None:
    """I15, I07: six rows, twice."""
    own = replicas(2)
    data = own.make_numpy_dataset((np.arange(6), np.arange(6) * 10))
    iterator = own.make_dataset_iterator(DataLoader(data, batch_size=4))
    for _ in range(2):
        dealt = [[[part.tolist() for part in leaf.values] for leaf in batch] for batch in iterator]
        assert dealt == [[[[0, 1], [2, 3]], [[0, 10], [20, 30]]], [[[4], [5]], [[40], [50]]]]
        iterator.initialize()


def test_rows_are_shuffled_by_a_loader() -> None:
    """I15."""
    data = replicas(1).make_numpy_dataset({"x": np.arange(8), "y": np.arange(8) * 2})
    rows = [row for batch in DataLoader(data, 3, shuffle=True) for row in torch.stack(list(batch.values()), 1).tolist()]
    assert sorted(rows) == [[index, 2 * index] for index in range(8)]


def test_the_memory_of_an_array_is_shared() -> None:
    """I15: nothing is copied, however big it is."""
    array = np.zeros((3, 2))
    data = replicas(1).make_numpy_dataset(array)
    array[1] = 5
    assert data[1].tolist() == [5.0, 5.0]
    tensor = torch.zeros(2)
    assert replicas(1).make_numpy_dataset([tensor])[0][0].data_ptr() == tensor.data_ptr()


def test_a_mapped_file_is_read_row_by_row_and_never_written(tmp_path: Path) -> None:
    """I15."""
    np.save(tmp_path / "rows.npy", np.arange(6).reshape(3, 2))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    data = replicas(1).make_numpy_dataset(mapped)
    row = data[1]
    assert row.tolist() == [2, 3]
    row += 1
    assert data[1].tolist() == [2, 3]


@pytest.mark.parametrize(
    "array",
    [np.arange(3)[::-1], np.arange(3)[::-1].astype(">i8"), np.broadcast_to(np.int64(2), 3) - np.arange(3)],
    ids=["backwards", "other byte order", "broadcast"],
)
def test_layouts_that_torch_does_not_know_are_copied(array: Any) -> None:
    """I15."""
    assert [row.item() for row in DataLoader(replicas(1).make_numpy_dataset(array), batch_size=None)] == [2, 1, 0]


def test_scalars_of_read_only_arrays_keep_their_dtype() -> None:
    """I15."""
    array = np.ones(2, np.float32)
    array.flags.writeable = False
    assert replicas(1).make_numpy_dataset(array)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((np.zeros(3), np.zeros(4)), r"the same number of rows, got \[3, 4\]"),
        ({}, "got no arrays"),
        (np.float64(1.0), r"expected arrays with rows, got a float64 of shape \[\]"),
        (torch.tensor(1), r"got a Tensor of shape \[\]"),
        ([1, 2, 3], "got a int; make one of it with numpy.asarray"),
        (np.array(["a", "b"]), "no tensor can hold an array of dtype <U1"),
        (np.array([None]), "dtype object"),
    ],
    ids=repr,
)
def test_what_makes_no_rows_is_refused(arrays: Any, message: str) -> None:
    """I15."""
    with pytest.raises(ValueError, match=message):
        replicas(1).make_numpy_dataset(arrays)
