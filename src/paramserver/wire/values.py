"""Tensors as bytes in a message, for values outside of the arenas that both sides know."""

from __future__ import annotations

import torch

from paramserver.memory.arena_memory import tensor_bytes


def packed(values: torch.Tensor) -> bytes:
    """Return the elements of a flat tensor on any device as bytes.

    >>> packed(torch.tensor([1, 2], dtype=torch.int16)).hex()
    '01000200'
    """
    return bytes(tensor_bytes(values.cpu().clone(memory_format=torch.contiguous_format)))  # also of expanded tensors


def unpacked(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return a new flat tensor of the elements in ``data``.

    >>> unpacked(packed(torch.tensor([1, 2])), torch.int64)
    tensor([1, 2])

    Raises:
        ValueError: If the bytes are not a whole number of elements.
    """
    if len(data) % dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are not a whole number of elements of {dtype.itemsize} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
