"""A kit that checks an update rule of your own, before it is used with a parameter server.

A check is a function of a *maker*, which makes the optimizer over parameters; it raises ``AssertionError`` with the
expectation that failed. `RULE_CHECKS` hold for every rule.

Example:
    >>> for check in RULE_CHECKS:
    ...     check(lambda parameters: torch.optim.Adagrad(parameters, lr=0.1))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn, optim

from paramserver.errors import UnsupportedOptimizerError
from paramserver.layout.rules import Rule, describe, describe_row_rule, find_rule
from paramserver.store.block_rule import BlockRule
from paramserver.store.tables.row_rule import RowRule

Maker = Callable[[list[nn.Parameter]], optim.Optimizer]
"""Function that makes the optimizer over some parameters, always with the same settings."""

SHAPE = (6, 4)
STEPS = 5


def check_the_rule_is_found(maker: Maker) -> None:
    """Check that the rule is found by its name, and all its settings are numbers."""
    rule = _described(maker)
    if rule is not None:
        expect(find_rule(rule).optimizer is type(maker(_parameters())), f"{rule.name!r} names another class")


def check_every_element_is_for_itself(maker: Maker) -> None:
    """Check that a step over two slices of a flat parameter changes each element as a step over the whole one does."""
    rule = _described(maker)
    if rule is None:
        return
    whole, (parameter,) = _trained(maker), _parameters()
    values = parameter.detach().flatten()
    cut = len(values) // 3
    slices = [(0, cut), (cut, len(values))]
    blocks = [BlockRule(rule, values[start:stop]) for start, stop in slices]
    for gradient in _gradients():
        for block, (start, stop) in zip(blocks, slices, strict=True):
            block.apply(0, stop - start, gradient.flatten()[start:stop].clone(), rule.settings)
    expect_close(values, whole.flatten(), "two slices of a parameter")


def check_elements_without_a_gradient_rest(maker: Maker) -> None:
    """Check that updating a part of a block leaves the rest unchanged, and neither part loses its state."""
    rule = _described(maker)
    if rule is None:
        return
    whole, (parameter,) = _trained(maker), _parameters()
    values = parameter.detach().flatten()
    block, cut = BlockRule(rule, values), len(values) // 2
    for start, stop in ((0, cut), (cut, len(values))):
        for gradient in _gradients():
            block.apply(start, stop, gradient.flatten()[start:stop].clone(), rule.settings)
    expect_close(values, whole.flatten(), "halves of a block that are updated one after the other")


def check_state_is_of_tensors(maker: Maker) -> None:
    """Check that state consists of tensors with the parameter's shape and 0-dimensional ones.

    A checkpoint can hold no other state.
    """
    (parameter,) = parameters = _parameters()
    optimizer = maker(parameters)
    _step(optimizer, parameter, _gradients()[0], is_sparse=_described(maker) is None)
    for name, slot in optimizer.state.get(parameter, {}).items():
        fits = isinstance(slot, Tensor) and slot.shape in (parameter.shape, ())
        expect(fits or _described(maker) is None, f"slot {name!r} is {slot!r}, neither a scalar tensor nor elementwise")


def check_state_comes_back(maker: Maker) -> None:
    """Check that state that was taken out and put back continues as if nothing had happened."""
    rule = _described(maker)
    if rule is None:
        return
    whole, (parameter,) = _trained(maker), _parameters()
    values = parameter.detach().flatten()
    block = BlockRule(rule, values)
    for gradient in _gradients():
        block.apply(0, len(values), gradient.flatten().clone(), rule.settings)
        state = [(start, stop, _copied(slots)) for start, stop, slots in block.slots()]
        block = BlockRule(rule, values)
        for start, stop, slots in state:
            block.load(start, stop, slots)
    expect_close(values, whole.flatten(), "a rule whose state was put back after each step")


def check_rows_are_for_themselves(maker: Maker) -> None:
    """Check that the row form, if any, updates the rows with a gradient as the dense form would, and no others."""
    try:
        rule = describe_row_rule(maker(_parameters()), 0, "a table")
    except UnsupportedOptimizerError:
        return
    (parameter,) = _parameters()
    before, ids = parameter.detach().clone(), np.array([1, 4])
    rows, table = nn.Parameter(before[ids].clone()), parameter.detach()
    optimizer, row_rule = maker([rows]), RowRule(rule, table)
    for gradient in _gradients():
        _step(optimizer, rows, gradient[ids], is_sparse=find_rule(rule).takes_sparse)
        row_rule.update(ids, gradient[ids].clone(), rule.settings).apply()
    expect_close(table[ids], rows.detach(), "rows of a table")
    others = [row for row in range(SHAPE[0]) if row not in ids]
    expect(torch.equal(table[others], before[others]), "rows without a gradient have changed")


def expect(holds: object, otherwise: str) -> None:
    """Check that something holds.

    Raises:
        AssertionError: If it does not.
    """
    if not holds:
        raise AssertionError(otherwise)


def expect_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Check that two tensors differ by rounding only.

    Raises:
        AssertionError: If they do not.
    """
    expect(torch.allclose(got, expected, rtol=1e-9, atol=1e-12), f"{what}: expected {expected}, got {got}")


def _described(maker: Maker) -> Rule | None:
    """Return the rule in its dense form; None if it has no dense form."""
    optimizer = maker(_parameters())
    found = find_rule(Rule(type(optimizer).__name__, {}))
    return describe(optimizer, 0) if found.is_dense else None


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64))]


def _gradients() -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def _trained(maker: Maker) -> Tensor:
    (parameter,) = parameters = _parameters()
    optimizer = maker(parameters)
    for gradient in _gradients():
        _step(optimizer, parameter, gradient, is_sparse=False)
    return parameter.detach()


def _step(optimizer: optim.Optimizer, parameter: nn.Parameter, gradient: Tensor, *, is_sparse: bool) -> None:
    parameter.grad = gradient.to_sparse(1) if is_sparse else gradient.clone()
    optimizer.step()


def _copied(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: slot.clone() for name, slot in slots.items()}


Check = Callable[[Maker], None]

RULE_CHECKS: tuple[Check, ...] = (
    check_the_rule_is_found,
    check_every_element_is_for_itself,
    check_elements_without_a_gradient_rest,
    check_state_is_of_tensors,
    check_state_comes_back,
    check_rows_are_for_themselves,
)
