"""Tensors of a model that share memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paramserver.distribute.bound.overlaps import check_apart
from paramserver.errors import ConfigError

FLAT = torch.arange(12.0)
MATRIX = FLAT.view(3, 4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FLAT, FLAT),
        (FLAT[:5], FLAT[4:]),
        (FLAT, FLAT[5:6]),
        (MATRIX, MATRIX.t()),
        (MATRIX[:, :2], MATRIX[:, 1:]),
        (MATRIX[:, ::2], MATRIX[:, ::3]),
        (FLAT[::2], FLAT[1::3]),
        (FLAT, FLAT.view(torch.int32)[3:4]),
        (FLAT[0].expand(3), FLAT),
    ],
)
def test_tensors_that_share_memory_are_refused(one: Tensor, other: Tensor) -> None:
    for tensors in ({"a": one, "b": other}, {"a": other, "b": one}):
        with pytest.raises(ConfigError, match=r"'[ab]' and '[ab]' are two tensors that share memory"):
            check_apart(tensors, {})
    with pytest.raises(ConfigError, match="share memory"):
        check_apart({"a": one}, {"b": other})
    check_apart({}, {"a": one, "b": other})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FLAT, FLAT.clone()),
        (FLAT[:4], FLAT[4:]),
        (MATRIX[0], MATRIX[1]),
        (MATRIX[:, :2], MATRIX[:, 2:]),
        (FLAT[::2], FLAT[1::2]),
        (FLAT[:0], FLAT),
        (torch.zeros(3, device="meta"), torch.zeros(3, device="meta")),
    ],
)
def test_tensors_that_lie_apart_may_lie_in_one_storage(one: Tensor, other: Tensor) -> None:
    check_apart({"a": one, "b": other}, {})
    check_apart({"b": other, "a": one}, {})


def test_a_large_one_before_many_small_ones_is_noticed() -> None:
    small = {f"s{index}": FLAT[index : index + 1] for index in range(12)}
    check_apart(small, {})
    with pytest.raises(ConfigError, match="'s0' and 'whole'"):
        check_apart({**small, "whole": FLAT[:7]}, {})
