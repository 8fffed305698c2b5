"""Datasets of arrays in the memory of a worker's host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from paramserver.distribute.core import context
from paramserver.distribute.core.nest import leaves, map_leaves
from paramserver.distribute.core.worker import Worker
from paramserver.errors import ConfigError


class ArrayDataset(Dataset[Any]):
    """The rows of a nest of arrays, as a map-style dataset: item ``i`` is the nest of their rows ``i``, as tensors.

    >>> data = ArrayDataset({"x": np.arange(6.0).reshape(3, 2), "y": np.array([0, 1, 0])})
    >>> len(data), data[1]
    (3, {'x': tensor([2., 3.], dtype=torch.float64), 'y': tensor(1)})

    Args:
        arrays: A nest of arrays or tensors ``[rows, ...]``. Their memory is shared, not copied, except for arrays with
            a memory layout that torch does not know. Rows of a read-only array, such as a mapped file, are copied when
            they are drawn.

    Raises:
        ConfigError: If a leaf is not an array or has a dtype that torch does not know, or the numbers of rows differ.
    """

    def __init__(self, arrays: Any) -> None:
        self._arrays = map_leaves(_shared, arrays)
        lengths = sorted({len(leaf) for leaf in leaves(self._arrays)})
        if len(lengths) != 1:
            raise ConfigError(
                f"make_numpy_dataset: expected arrays with the same number of rows, got {lengths or 'no arrays'}"
            )
        self._length = lengths[0]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return map_leaves(lambda leaf: _row(leaf, index), self._arrays)


def make_numpy_dataset(strategy: Worker, arrays: Any) -> ArrayDataset:
    """Return a dataset of the rows of a nest of arrays, which stay in this worker's memory and reach no ps.

    Args:
        strategy: The strategy of the worker.
        arrays: A nest of arrays or tensors ``[rows, ...]``.

    Returns:
        A map-style torch Dataset of rows. Wrap it in a DataLoader for batches, and distribute that.

    Raises:
        ValueError: On a task that does not train, or if the arrays cannot make a dataset.
        RuntimeError: Inside a replica, or inside the scope of another strategy.
    """
    with context.cross_replica(strategy, "make_numpy_dataset"):
        _ = strategy.input_context  # raises on a task that reads no input
        return ArrayDataset(arrays)


def _shared(leaf: Any) -> torch.Tensor | np.ndarray[Any, Any]:
    if not isinstance(leaf, (torch.Tensor, np.ndarray)) or not leaf.ndim:
        shape = f" of shape {list(leaf.shape)}" if hasattr(leaf, "shape") else ""
        raise ConfigError(
            f"make_numpy_dataset: expected arrays with rows, got a {type(leaf).__name__}{shape}; "
            "make one of it with numpy.asarray"
        )
    if isinstance(leaf, torch.Tensor):
        return leaf
    if not leaf.dtype.isnative or any(stride < 0 for stride in leaf.strides):
        leaf = np.ascontiguousarray(leaf, dtype=leaf.dtype.newbyteorder("="))
    _check_dtype(leaf)
    return torch.from_numpy(leaf) if leaf.flags.writeable else leaf


def _check_dtype(array: np.ndarray[Any, Any]) -> None:
    try:
        torch.from_numpy(np.empty(0, array.dtype))
    except TypeError as error:
        raise ConfigError(
            f"make_numpy_dataset: no tensor can hold an array of dtype {array.dtype}; encode it as numbers first"
        ) from error


def _row(leaf: torch.Tensor | np.ndarray[Any, Any], index: int) -> torch.Tensor:
    return leaf[index] if isinstance(leaf, torch.Tensor) else torch.tensor(leaf[index])
