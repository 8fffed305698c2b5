"""Tensors of a model that share memory without being one tensor, as ``b.data = a.data`` makes them.

Each variable has memory of its own after ``prepare``. Tensors that share memory would silently come apart there, so a
model with such tensors is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch

from paramserver.errors import ConfigError


class _Span(NamedTuple):
    """The bytes of a storage that a tensor extends over."""

    start: int
    stop: int
    name: str
    tensor: torch.Tensor


def check_apart(moved: Mapping[str, torch.Tensor], left: Mapping[str, torch.Tensor]) -> None:
    """Check that the tensors to be moved share no memory.

    Args:
        moved: The tensors to be moved by name, each of them once.
        left: The tensors that stay where they are, which may share memory with each other.

    Raises:
        ConfigError: If a moved tensor shares memory with another tensor, naming both.
    """
    by_storage: dict[int, list[_Span]] = defaultdict(list)
    for name, tensor in (*moved.items(), *left.items()):
        if tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta:
            by_storage[tensor.untyped_storage().data_ptr()].append(_span(name, tensor))
    for spans in by_storage.values():
        earlier: list[_Span] = []
        for span in sorted(spans, key=lambda span: span[:2]):
            earlier = [each for each in earlier if each.stop > span.start]
            for each in earlier:
                if (span.name in moved or each.name in moved) and _overlap(span.tensor, each.tensor):
                    raise _shared(each.name, span.name)
            earlier.append(span)


def _span(name: str, tensor: torch.Tensor) -> _Span:
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, itemsize = int(tensor.storage_offset()), tensor.element_size()
    return _Span(start * itemsize, (start + last + 1) * itemsize, name, tensor)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether tensors with overlapping spans have a common element; columns of one matrix have none."""
    if one.dtype is not other.dtype or (one.is_contiguous() and other.is_contiguous()):
        return True
    is_taken = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool, device="cpu")
    is_taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(is_taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _shared(one: str, other: str) -> ConfigError:
    return ConfigError(
        f"prepare: {one!r} and {other!r} are two tensors that share memory, and each variable has memory of its own on "
        "a ps: they would come apart. To tie weights, use one parameter by both names (second.weight = first.weight, "
        "not second.weight.data = first.weight.data); to have two weights, clone one of them"
    )
