"""What a lookup asks for, and the gradient of what it gets."""

import numpy as np
import pytest
import torch
from torch import nn

from paramserver.distribute.bound.tables import lookup
from paramserver.distribute.bound.tables.lookup import Lookup, look_up_in
from paramserver.memory import rows
from paramserver.memory.rows import loops_for


@pytest.fixture
def loops(monkeypatch):
    monkeypatch.setattr(rows, "LARGE", 0)
    return loops_for(0, torch.float32)


@pytest.mark.parametrize("with_loops", [False, True])
@pytest.mark.parametrize("largest", [0, 5, 1 << 40])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_each_id_is_found_once_and_every_place_of_it(loops, with_loops, largest, count):
    ids = np.random.default_rng(0).integers(0, largest, count, endpoint=True)
    before = ids.copy()
    lookup = Lookup.of(ids, loops if with_loops else None)
    expected, places = np.unique(ids, return_inverse=True)
    assert lookup.rows.tolist() == expected.tolist()
    assert lookup.places().tolist() == places.tolist()
    assert lookup.order.tolist() == np.argsort(ids, kind="stable").tolist()
    assert lookup.numbers.tolist() == places[lookup.order].tolist()
    assert lookup.ids.tolist() == ids.tolist() == before.tolist()


class Held:
    """A table that holds its rows itself."""

    name = "table"

    def __init__(self, values, loops):
        self._values = values
        self.loops = loops

    def pull(self, ids):
        return self._values[torch.from_numpy(ids)]

    def pull_batch(self, lookup):
        return self._values[torch.from_numpy(lookup.ids)]

    def whole(self, weight):
        return self._values


@pytest.fixture(params=["many", "few", "loops"])
def alike(request, monkeypatch, loops):
    """Torch's own module and one that looks rows up, with the same values; 7 is the padding."""
    monkeypatch.setattr(lookup, "MANY_IDS", 0 if request.param == "many" else 100)
    plain = nn.Embedding(40, 3, sparse=True, padding_idx=7)
    ours = nn.Embedding(40, 3, sparse=True, padding_idx=7)
    look_up_in(ours, Held(plain.weight.detach().clone(), loops if request.param == "loops" else None))
    return plain, ours


FEW_REPEATS = [[3, 9, 7], [20, 3, 30]]
MOST_ARE_REPEATS = [[3, 3, 7], [3, 9, 7]]


@pytest.mark.parametrize("ids", [FEW_REPEATS, MOST_ARE_REPEATS, [[1, 2, 3]], [[]]], ids=str)
def test_a_lookup_has_torchs_values_and_gradient(alike, ids):
    ids = torch.tensor(ids, dtype=torch.int64)
    factors = torch.rand(*ids.shape, 3)
    found = [module(ids) for module in alike]
    for each in found:
        (each * factors).sum().backward()
    plain, ours = (module.weight.grad.coalesce() for module in alike)
    assert torch.equal(found[0], found[1])
    assert torch.equal(plain.to_dense(), ours.to_dense())
    assert ours.indices()[0].tolist() == sorted({*ids.flatten().tolist()} - {7})


def test_the_gradient_of_a_lookup_may_come_as_a_part_of_something(alike):
    ids = torch.tensor(FEW_REPEATS)
    factors = torch.rand(2, 11)
    for module in alike:
        (torch.cat([module(ids).flatten(1), torch.ones(2, 2)], 1) * factors).sum().backward()
    plain, ours = (module.weight.grad.to_dense() for module in alike)
    assert plain.any()
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("ids", [FEW_REPEATS, MOST_ARE_REPEATS], ids=str)
def test_the_gradient_of_a_lookup_has_a_gradient(alike, ids):
    ids, second = torch.tensor(ids), []
    for module in alike:
        factors = torch.arange(18.0).view(2, 3, 3).requires_grad_()
        (gradient,) = torch.autograd.grad((module(ids) * factors).sum(), module.weight, create_graph=True)
        gradient.to_dense().square().sum().backward()
        second.append(factors.grad)
    assert second[1].any()
    assert torch.equal(*second)
