"""What of a module lives on parameter servers, and what cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim

import paramserver as ps
from paramserver.distribute.bound.plan import Kind, aliases, collect, plan
from paramserver.errors import ConfigError, UnsupportedOptimizerError
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.placement import RoundRobin


class Model(nn.Module):
    """Parameters and buffers of every kind, some with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(2, 3, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.index = nn.Parameter(torch.arange(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([True]))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("nothing", None)


def test_parameters_come_first_then_buffers_under_the_names_of_the_state_dict() -> None:
    model = Model()
    variables = collect(model, [optim.SGD(model.parameters(), lr=0.1)])
    assert [(variable.spec.name, variable.kind) for variable in variables] == [
        ("frozen", Kind.FROZEN),
        ("index", Kind.CONSTANT),
        ("first.weight", Kind.TRAINED),
        ("first.bias", Kind.TRAINED),
        ("norm.weight", Kind.TRAINED),
        ("norm.bias", Kind.TRAINED),
        ("mask", Kind.ASSIGNED),
        ("norm.running_mean", Kind.COUNTED),
        ("norm.running_var", Kind.COUNTED),
        ("norm.num_batches_tracked", Kind.COUNTED),
    ]
    assert {variable.spec.name for variable in variables} | set(aliases(model)) == set(model.state_dict())


def test_a_tensor_of_two_names_is_one_variable() -> None:
    assert aliases(Model()) == {"second.weight": "first.weight"}


def test_what_no_optimizer_holds_is_constant() -> None:
    model = nn.Linear(2, 3)
    weight, bias = collect(model, [optim.SGD([model.bias], lr=0.1)])
    assert (weight.kind, weight.group, bias.kind, bias.group) == (Kind.CONSTANT, -1, Kind.TRAINED, 0)
    assert {variable.kind for variable in collect(model, [])} == {Kind.CONSTANT}


def test_variables_of_one_dtype_group_and_kind_share_an_arena() -> None:
    """P01, W09: round robin over ps tasks in creation order; what belongs together lies together."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    arenas = plan(collect(model, [optimizer]), [optimizer], RoundRobin().start(2), num_ps=2)
    found = [[(arena.ps, arena.index, arena.layout.dtype, *names(arena)) for arena in each] for each in arenas]
    assert found == [
        [(0, 0, "float32", "0.weight", "2.weight"), (0, 1, "float64", "1.weight")],
        [(1, 0, "float32", "0.bias", "2.bias"), (1, 1, "float64", "1.bias")],
    ]


def test_every_worker_finds_the_same_places() -> None:
    """W02."""

    def layouts() -> object:
        model = Model()
        optimizer = optim.Adam(model.parameters())
        arenas = plan(collect(model, [optimizer]), [optimizer], RoundRobin().start(3), num_ps=3)
        return [[arena.layout for arena in each] for each in arenas]

    assert layouts() == layouts()


def thirds(spec: VariableSpec) -> list[tuple[int, int]]:
    """Six rows in three parts; all else stays whole."""
    return [(0, 2), (2, 4), (4, 6)] if spec.shape[:1] == (6,) else [(0, spec.shape[0])] if spec.shape else []


def test_parts_of_a_variable_are_variables_with_places_of_their_own() -> None:
    """P07: parts of a parameter that an optimizer holds; round robin goes on with the next variable."""
    model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6))
    optimizer = optim.SGD(model[0].parameters(), lr=0.1)
    arenas = plan(collect(model, [optimizer]), [optimizer], RoundRobin().start(2), 2, thirds)
    trained = [arena for each in arenas for arena in each if arena.kind is Kind.TRAINED]
    assert [names(arena) for arena in trained] == [
        ["0.weight/part_0", "0.weight/part_2", "0.bias/part_1"],
        ["0.weight/part_1", "0.bias/part_0", "0.bias/part_2"],
    ]
    held = [(member.rows, member.spec.shape, member.spec.shard) for arena in trained for member in arena.members]
    assert held[0] == ((0, 2), (2, 2), Shard("0.weight", 0, 0, 6))
    assert held[1] == ((4, 6), (2, 2), Shard("0.weight", 2, 4, 6))
    assert held[2] == ((2, 4), (2,), Shard("0.bias", 1, 2, 6))
    rest = {name for each in arenas for arena in each if arena not in trained for name in names(arena)}
    assert rest == {"1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias"}


def names(arena: Any) -> list[str]:
    return [member.spec.name for member in arena.members]


# --- several optimizers


def test_groups_are_counted_through_all_optimizers() -> None:
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
    one = optim.SGD([{"params": model[2].parameters()}, {"params": model[0].parameters()}], lr=0.1)
    other = optim.Adam(model[1].parameters())
    variables = collect(model, [one, other])
    assert [(variable.spec.name, variable.group) for variable in variables] == [
        ("0.weight", 1), ("1.weight", 2), ("2.weight", 0)
    ]  # fmt: skip
    ((*arenas,),) = plan(variables, [one, other], RoundRobin().start(1), 1)
    assert [(names(arena), arena.layout.rule.name) for arena in arenas] == [
        (["0.weight"], "SGD"), (["1.weight"], "Adam"), (["2.weight"], "SGD")
    ]  # fmt: skip


def test_a_parameter_of_two_optimizers_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"a parameter of shape \[2, 2\] is held by two optimizers"):
        collect(model, [sgd(model), optim.Adam([model.weight])])


def prepare(model: nn.Module, optimizer: optim.Optimizer) -> None:
    ps.ParameterServerStrategy().prepare(model, optimizer)


def sgd(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1)


def test_an_optimizer_with_parameters_of_another_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    stranger = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="the optimizer holds 2 parameters that the model does not have"):
        prepare(model, optim.SGD([*model.parameters(), *stranger.parameters()], lr=0.1))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_is_refused() -> None:
    model = nn.LazyLinear(3)
    with pytest.raises(ConfigError, match="'weight' has no shape yet; run the lazy module once"):
        prepare(model, sgd(model))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_no_ps_holds_is_refused(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.odd = nn.Parameter(torch.zeros(2).to(dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=f"'odd' has dtype {name}, which .* expected one of float32"):
        prepare(model, sgd(model))


def test_a_model_on_the_meta_device_is_refused() -> None:
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(ConfigError, match="'weight' is on the meta device and has no values"):
        prepare(model, sgd(model))


def test_a_sparse_buffer_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("graph", torch.eye(2).to_sparse())
    with pytest.raises(ConfigError, match="'graph' is a sparse tensor"):
        prepare(model, sgd(model))


class OwnSGD(optim.SGD):
    """A subclass, whose step may do anything."""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda parameters: optim.LBFGS(parameters), "LBFGS cannot run on a parameter server: its line search"),
        (lambda parameters: optim.SparseAdam(parameters), "SparseAdam cannot run on a parameter server"),
        (lambda parameters: optim.Adafactor(parameters), "Adafactor cannot run on a parameter server"),
        (lambda parameters: OwnSGD(parameters, lr=0.1), "OwnSGD cannot run .* use SGD itself"),
        (lambda parameters: optim.SGD(parameters, lr=0.1, differentiable=True), "leave differentiable=False"),
    ],
    ids=["LBFGS", "SparseAdam", "Adafactor", "subclass", "differentiable"],
)
def test_an_optimizer_that_no_ps_can_run_is_refused(make: Any, why: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedOptimizerError, match=why):
        prepare(model, make(model.parameters()))


def test_a_model_that_is_refused_is_as_before() -> None:
    model = nn.Linear(2, 2)
    address = model.weight.data_ptr()
    with pytest.raises(UnsupportedOptimizerError):
        prepare(model, optim.LBFGS(model.parameters()))
    assert model.weight.data_ptr() == address
