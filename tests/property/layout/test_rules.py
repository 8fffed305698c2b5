"""Whatever pieces a block is pushed in, each variable fares as under an optimizer of its own."""

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paramserver.layout.rules import RULES, describe
from paramserver.store.block_rule import BlockRule

# Of each kind: no state, a lazy buffer, eager state, scalars that are a product or a function of the step.
CASES = {
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}],
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1}],
    "AdamW": [{"lr": 0.1}],
    "NAdam": [{"lr": 0.1}],
    "ASGD": [{"lr": 0.1, "t0": 1.0, "lambd": 0.1}],
    "Rprop": [{"lr": 0.1}],
}
cases = st.sampled_from([(name, kwargs) for name, rows in CASES.items() for kwargs in rows])
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def pieces(present: list[bool], edges: list[int], whole: bool) -> list[tuple[int, int]]:
    """The ranges of the variables that are present; neighbours as one piece if `whole`."""
    ranges = [pair for pair, here in zip(itertools.pairwise(edges), present, strict=True) if here]
    if not whole:
        return ranges
    stops = {start for start, _ in ranges} & {stop for _, stop in ranges}
    starts = [start for start, _ in ranges if start not in stops]
    return list(zip(starts, [stop for _, stop in ranges if stop not in stops], strict=True))


def step_torch(optimizer: torch.optim.Optimizer, gradients: list[Tensor], present: list[bool]) -> None:
    for variable, gradient, here in zip(optimizer.param_groups[0]["params"], gradients, present, strict=True):
        variable.grad = gradient if here else None
    optimizer.step()


@given(cases, sizes, st.data())
def test_any_sequence_of_pieces_equals_torch(
    case: tuple[str, dict[str, Any]], sizes: list[int], data: st.DataObject
) -> None:
    name, kwargs = case
    generator = torch.Generator().manual_seed(0)
    variables = [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for size in sizes]
    optimizer = RULES[name].optimizer(variables, **kwargs)
    values = torch.cat([variable.detach().clone() for variable in variables])
    rule = BlockRule(describe(optimizer, 0), values)
    edges = [0, *itertools.accumulate(sizes)]
    steps = data.draw(
        st.lists(
            st.tuples(
                st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)),
                st.booleans(),
                st.booleans(),
            ),
            max_size=6,
        )
    )
    for present, whole, join in steps:
        gradient = torch.randn(len(values), generator=generator, dtype=torch.float64)
        step_torch(optimizer, list(torch.split(gradient, sizes)), present)
        for start, stop in pieces(present, edges, whole):
            rule.apply(start, stop, gradient[start:stop], {})
        if join:
            rule.join()
        expected = torch.cat([variable.detach() for variable in variables])
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 40), st.data())
def test_slots_cover_what_was_updated_and_nothing_else(size: int, data: st.DataObject) -> None:
    rule = BlockRule(describe(torch.optim.Adam([torch.zeros(1)]), 0), torch.zeros(size))
    counts = torch.zeros(size)
    ranges = st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda pair: pair[0] < pair[1])
    for start, stop in data.draw(st.lists(ranges, max_size=8)):
        rule.apply(start, stop, torch.ones(stop - start), {})
        counts[start:stop] += 1
    seen = torch.zeros(size)
    for start, stop, state in rule.slots():
        assert len(state["exp_avg"]) == stop - start
        seen[start:stop] += state["step"]
    assert torch.equal(seen, counts)
