"""Reducing the value of one replica."""

import pytest
import torch

import paramserver as ps
from paramserver.distribute.reduction import reduce

VALUE = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("op", ["sum", "SUM", "Sum", "mean", "MEAN", ps.ReduceOp.SUM, ps.ReduceOp.MEAN])
def test_an_op_goes_by_name_in_any_case_or_as_a_reduce_op(op: str | ps.ReduceOp) -> None:
    """D01."""
    assert reduce(op, VALUE, None) is VALUE


def test_without_an_axis_only_replicas_are_combined() -> None:
    """D02: and there is one."""
    strategy = ps.ParameterServerStrategy()
    assert strategy.reduce("mean", VALUE) is VALUE


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), [0, -1]])
def test_an_axis_is_combined_inside_the_replica(axis: int | tuple[int, ...] | list[int]) -> None:
    """D03, D04, D05."""
    torch.testing.assert_close(reduce("sum", VALUE, axis), VALUE.sum(axis))
    torch.testing.assert_close(reduce("mean", VALUE, axis), VALUE.mean(axis))


def test_an_unknown_op_is_refused() -> None:
    """D01, D12."""
    with pytest.raises(ValueError, match="unknown op 'max'; expected 'sum' or 'mean'"):
        reduce("max", VALUE, None)
    with pytest.raises(TypeError, match="got int"):
        reduce(3, VALUE, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_an_axis_out_of_range_is_refused(axis: int | tuple[int, ...]) -> None:
    """D05."""
    with pytest.raises(ValueError, match="out of range for value with rank 2"):
        reduce("sum", VALUE, axis)


@pytest.mark.parametrize("axis", ["0", 1.0, {0}, (0, "1")])
def test_an_axis_that_is_none_is_refused(axis: object) -> None:
    """D05."""
    with pytest.raises(TypeError, match="axis must be an int or a list or tuple of ints"):
        reduce("sum", VALUE, axis)  # type: ignore[arg-type]
