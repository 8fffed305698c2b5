"""Any numbers of replicas and any shapes: reductions agree with the same thing computed in one tensor."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import paramserver as ps
from paramserver.distribute.reduce.combining import add_all

numbers = st.integers(-100, 100)
replicas = st.integers(2, 4)


def strategy(count: int) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(count)])


@st.composite
def batches(draw: st.DrawFn) -> list[torch.Tensor]:
    """A batch ``[rows, 2]`` for each of several replicas, all of them together not empty."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=2, max_size=4).filter(any))
    rows = st.lists(numbers, min_size=2, max_size=2)
    made = [draw(st.lists(rows, min_size=size, max_size=size)) for size in sizes]
    return [torch.tensor(each, dtype=torch.float64).reshape(-1, 2) for each in made]


@st.composite
def tables(draw: st.DrawFn) -> list[torch.Tensor]:
    """A sparse tensor ``[5, 2]`` for each of several replicas, with rows that are there several times."""
    entries = st.lists(st.tuples(st.integers(0, 4), numbers), max_size=6)
    return [
        torch.sparse_coo_tensor(
            torch.tensor([[index for index, _ in each]], dtype=torch.int64),
            torch.tensor([[value, -value] for _, value in each], dtype=torch.float64).reshape(-1, 2),
            (5, 2),
            check_invariants=True,
        )
        for each in draw(st.lists(entries, min_size=2, max_size=4))
    ]


@given(batches(), st.sampled_from([0, (0,), (0, 1), (-2, -1)]))
def test_batches_of_any_sizes_are_reduced_as_one(parts: list[torch.Tensor], axis: int | tuple[int, ...]) -> None:
    """D03, D04."""
    runner, together = strategy(len(parts)), torch.cat(parts)
    torch.testing.assert_close(runner.reduce("sum", ps.PerReplica(parts), axis), together.sum(axis))
    torch.testing.assert_close(runner.reduce("mean", ps.PerReplica(parts), axis), together.mean(axis))


@given(st.lists(numbers, min_size=2, max_size=5))
def test_numbers_are_reduced_as_python_does(values: list[int]) -> None:
    """D02."""
    runner, given_values = strategy(len(values)), ps.PerReplica(values)
    assert runner.reduce("sum", given_values) == sum(values)
    torch.testing.assert_close(runner.reduce("mean", given_values), torch.tensor(sum(values) / len(values)))


@given(tables())
def test_sparse_sums_mean_what_dense_ones_do(parts: list[torch.Tensor]) -> None:
    """D13."""
    total = add_all(parts)
    assert total._nnz() == sum(part._nnz() for part in parts)
    assert torch.equal(total.to_dense(), torch.stack([part.to_dense() for part in parts]).sum(0))


@given(batches())
def test_what_is_gathered_can_be_split_again(parts: list[torch.Tensor]) -> None:
    """D18."""
    gathered = strategy(len(parts)).gather(ps.PerReplica(parts), 0)
    for part, again in zip(parts, gathered.split([len(part) for part in parts]), strict=True):
        assert torch.equal(part, again)


@given(batches())
def test_gradients_of_collectives_are_those_of_one_graph(parts: list[torch.Tensor]) -> None:
    """D20, D21: of the sum of all replicas' losses."""
    runner = strategy(len(parts))

    def step(part: torch.Tensor) -> list[torch.Tensor]:
        replica, own = ps.get_replica_context(), part.clone().requires_grad_()
        assert replica is not None
        gathered = replica.all_gather(own, axis=0) * replica.all_reduce("sum", own.sum(0))
        (gathered * (replica.index + 1)).sum().backward()
        return [own.grad]  # type: ignore[list-item]  # it has one

    (found,) = runner.run(step, [ps.PerReplica(parts)])
    leaves = [part.clone().requires_grad_() for part in parts]
    together = torch.cat(leaves)
    loss = (together * together.sum(0)).sum() * sum(range(1, len(parts) + 1))
    for own, expected in zip(found.values, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(own, expected)
