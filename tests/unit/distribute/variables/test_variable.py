"""ps.Variable on a ps that is played in this process: creation, reading, assigning, and standing in for a tensor."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paramserver as ps
from paramserver.client.client import ParameterClient
from paramserver.distribute.variables.plain import PlainVariable
from paramserver.layout.blocks import BLOCK
from paramserver.server.server import play_in_process

CLUSTER = ps.ClusterSpec({"chief": ["a:1"], "ps": ["b:1", "c:1", "d:1"]})


def on_three_ps(**options: Any) -> ps.ParameterServerStrategy:
    """A chief of a cluster whose three ps tasks are played in this process."""
    resolver = ps.SimpleClusterResolver(CLUSTER, task_type="chief", task_id=0)
    strategy = ps.ParameterServerStrategy(resolver, **options)
    strategy.client = ParameterClient([play_in_process(index=index)() for index in range(3)])
    return strategy


@pytest.fixture
def strategy() -> ps.ParameterServerStrategy:
    return ps.ParameterServerStrategy()


@pytest.fixture
def create(strategy: ps.ParameterServerStrategy) -> Callable[..., ps.Variable]:
    """`ps.Variable` in the scope of a strategy."""

    def create(*args: Any, **kwargs: Any) -> ps.Variable:
        with strategy.scope():
            return ps.Variable(*args, **kwargs)

    return create


# --- creation


def test_p01_ps_tasks_take_turns_in_the_order_of_creation_in_all_scopes() -> None:
    """The devices are canonical names; a slot that the model takes counts as well."""
    strategy = on_three_ps()
    with strategy.scope():
        first = [ps.Variable(0, name=name) for name in "nx"]
    model = nn.Linear(1, 1, bias=False)
    strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with strategy.scope():
        third = ps.Variable(0, name="z")
    assert [variable.device for variable in [*first, third]] == [
        f"/job:ps/task:{task}/device:CPU:0" for task in (0, 1, 0)
    ]
    assert [variable.assign(9).item() for variable in [*first, third]] == [9, 9, 9]
    assert [status.num_variables for status in strategy.connect().status()] == [2, 1, 1]


def test_p01_each_strategy_counts_for_itself() -> None:
    devices = []
    for strategy in (on_three_ps(), on_three_ps()):
        with strategy.scope():
            devices.append([ps.Variable(0).device for _ in range(4)])
    assert devices[0] == devices[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_p02_v2_07_a_device_that_a_program_is_on_is_ignored(create: Any, device: str) -> None:
    with torch.device(device):
        variable = create(np.ones(2))
        assert variable.device == "/device:CPU:0"
        assert variable.value().device == torch.device("cpu")


def test_p09_one_replica_has_a_plain_variable(create: Any) -> None:
    variable = create(0, aggregation=ps.VariableAggregation.SUM)
    assert type(variable) is PlainVariable
    assert isinstance(variable, ps.Variable)
    assert variable.aggregation is ps.VariableAggregation.SUM
    assert variable.get() is variable


@pytest.mark.parametrize("mode", ["SUM", 3, None, ps.ReduceOp.SUM])
@pytest.mark.parametrize("replicas", [1, 2])
def test_p10_an_aggregation_that_is_none_is_refused_whatever_its_type(mode: Any, replicas: int) -> None:
    strategy = ps.ParameterServerStrategy(compute_devices=[f"cpu:{index}" for index in range(replicas)])
    with strategy.scope(), pytest.raises(ValueError) as caught:
        ps.Variable(0, name="seen", aggregation=mode)
    for part in ("'seen'", repr(mode), "ONLY_FIRST_REPLICA"):
        assert part in str(caught.value)
    with strategy.scope():
        assert ps.Variable(0, name="seen").name == "seen", "nothing was taken"


def test_outside_of_all_scopes_there_is_no_ps() -> None:
    with pytest.raises(RuntimeError, match=r"'seen'.*Need to be inside `with strategy.scope\(\):`"):
        ps.Variable(0, name="seen")


def test_names_are_made_unique_in_the_order_of_creation(create: Any, strategy: ps.ParameterServerStrategy) -> None:
    assert [create(0).name for _ in range(3)] == ["Variable", "Variable_1", "Variable_2"]
    assert [create(0, name=name).name for name in ("w", "w_1", "w", "w")] == ["w", "w_1", "w_2", "w_3"]
    model = nn.Linear(1, 1)
    strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert create(0, name="weight").name == "weight_1", "a checkpoint holds the model's beside it"


def test_a_model_may_not_take_the_name_of_a_variable(create: Any, strategy: ps.ParameterServerStrategy) -> None:
    create(0, name="bias")
    model = nn.Linear(1, 1)
    with pytest.raises(ps.errors.ConfigError, match="'bias' of the model: a ps.Variable of that name"):
        strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("initial", "dtype", "expected"),
    [
        (1.5, None, torch.tensor(1.5)),
        (3, None, torch.tensor(3)),
        (True, None, torch.tensor(True)),
        (3, torch.float16, torch.tensor(3.0, dtype=torch.float16)),
        ([1, 2], None, torch.tensor([1, 2])),
        (np.float32([[1, 2], [3, 4]]), None, torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        (torch.ones(2, dtype=torch.bfloat16), None, torch.ones(2, dtype=torch.bfloat16)),
        (torch.arange(6.0).view(2, 3).T, None, torch.arange(6.0).view(2, 3).T.contiguous()),
        (nn.Parameter(torch.ones(2)), torch.float64, torch.ones(2, dtype=torch.float64)),
        (lambda: np.zeros((0, 3)), None, torch.zeros(0, 3, dtype=torch.float64)),
        (torch.eye(2).to_sparse(), None, torch.eye(2)),
        (torch.tensor(2.0).expand(1), None, torch.tensor([2.0])),
    ],
)
def test_an_initial_value_is_a_tensor_a_number_an_array_or_a_function(
    create: Any, initial: Any, dtype: Any, expected: torch.Tensor
) -> None:
    variable = create(initial, dtype=dtype)
    assert (variable.shape, variable.dtype) == (expected.shape, expected.dtype)
    value = variable.value()
    assert torch.equal(value, expected)
    assert value.is_contiguous()
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        (1j, "variable 'w' has dtype complex64"),
        ("text", "initial value of variable 'w'"),
        (None, "initial value of variable 'w'"),
    ],
)
def test_what_no_ps_can_hold_is_refused(create: Any, initial: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(initial, name="w")


def test_x12_a_variable_knows_its_strategy(create: Any, strategy: ps.ParameterServerStrategy) -> None:
    """A09: by both names."""
    variable = create(0, trainable=False)
    assert variable.strategy is variable.distribute_strategy is strategy
    assert strategy.extended.variable_created_in_scope(variable)
    assert not ps.ParameterServerStrategy().extended.variable_created_in_scope(variable)
    assert variable.trainable is False


def test_its_repr_says_what_it_is_and_asks_nobody(create: Any, strategy: ps.ParameterServerStrategy) -> None:
    variable = create(torch.zeros(3, 2), name="table")
    strategy.close()
    assert repr(variable) == str(variable) == "<ps.Variable 'table' float32[3, 2] on /device:CPU:0>"
    with pytest.raises(ps.errors.LocalProtocolError, match="said goodbye"):
        variable.value()


# --- assigning


def test_an_assignment_returns_what_it_made(create: Any) -> None:
    variable = create([1.0, 2.0])
    assert variable.assign([3, 4]).tolist() == [3, 4]
    assert variable.assign_add(torch.tensor([1.0, 1.0])).tolist() == [4, 5]
    assert variable.assign_sub(np.float64([0.5, 1.5])).tolist() == [3.5, 3.5]
    assert variable.assign_add(variable).tolist() == [7, 7]
    assert variable.assign(0.25).tolist() == [0.25, 0.25]
    assert variable.read_value().tolist() == variable.value().tolist() == [0.25, 0.25]


def test_a_value_is_a_copy(create: Any, strategy: ps.ParameterServerStrategy) -> None:
    """A11: also the one of read_var; nothing that is done to it reaches the ps."""
    variable = create([1.0, 2.0])
    for value in (variable.value(), variable.assign_add(0), strategy.extended.read_var(variable)):
        value.zero_()
    assert variable.value().tolist() == [1, 2]


@pytest.mark.parametrize("number", [1, 1.0, True, np.int32(1), np.float64(1)])
def test_a07_a_number_keeps_the_dtype(create: Any, number: Any) -> None:
    step = create(41, dtype=torch.int64)
    assert step.assign_add(number).dtype is torch.int64
    assert int(step) == 42


def test_a_number_keeps_its_digits(create: Any) -> None:
    variable = create(0.0, dtype=torch.float64)
    assert variable.assign(0.1).item() == 0.1


def test_subtracting_is_exact_in_every_dtype(create: Any) -> None:
    for dtype in (torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        variable = create([7, 3], dtype=dtype)
        assert variable.assign_sub([7, 1]).tolist() == [0, 2], dtype


@pytest.mark.parametrize(
    ("initial", "value", "message"),
    [
        ([1.0, 2.0], [1, 2, 3], r"expected a value of float32\[2\], got int64\[3\]"),
        ([1.0, 2.0], torch.tensor(1.0), r"expected a value of float32\[2\], got float32\[\]"),
        (1, 1.5, r"values that int64\[\] can hold, got 1.5"),
        (1, float("nan"), "can hold, got nan"),
        (1, torch.tensor(0.5), "can hold, got 0.5"),
        ([1.0], 1j, "can hold, got 1j"),
        (torch.tensor(1, dtype=torch.uint8), 300, "can hold, got 300"),
        (torch.tensor(1, dtype=torch.uint8), -1, "can hold, got -1"),
        (False, 2, "can hold, got 2"),
        (1.0, None, "a number or an array"),
        (1.0, "text", "a number or an array"),
        (1.0, ps.PerReplica([1.0, 2.0]), "cannot update variable with a PerReplica"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_changes_nothing(
    create: Any, initial: Any, value: Any, message: str
) -> None:
    variable = create(initial, name="w")
    before = variable.value()
    for call in (variable.assign, variable.assign_add, variable.assign_sub):
        if variable.dtype is not torch.bool or call == variable.assign:
            with pytest.raises(ValueError, match=rf"{call.__name__} to variable 'w': .*{message}"):
                call(value)
    assert torch.equal(variable.value(), before)


def test_bools_are_assigned_and_not_added(create: Any) -> None:
    flag = create(False, name="flag")
    assert flag.assign(True).item() is True
    assert flag.assign(0).item() is False
    with pytest.raises(ValueError, match="'flag': it holds bools"):
        flag.assign_add(True)


def test_what_is_larger_than_a_block_goes_block_by_block(create: Any) -> None:
    """All of it arrives, in messages of a block each."""
    values = (torch.arange(2 * BLOCK + 3) % 100).to(torch.int8)
    variable = create(values)
    assert torch.equal(variable.value(), values)
    assert torch.equal(variable.assign_add(1), values + 1)
    assert torch.equal(variable.assign_sub(values), torch.ones_like(values))
    assert torch.equal(variable.value(), torch.ones_like(values))


def test_a05_a_plain_variable_belongs_to_its_strategy_too(create: Any) -> None:
    """A program does the same with one replica and with several."""
    variable = create(0, name="w")
    with ps.ParameterServerStrategy().scope(), pytest.raises(RuntimeError, match="Mixing different strategies.*'w'"):
        variable.assign(1)
    assert variable.assign(1).item() == 1


def test_w04_one_replica_counts_once_whatever_the_aggregation(strategy: ps.ParameterServerStrategy) -> None:
    for mode in ps.VariableAggregation:
        with strategy.scope():
            variable = ps.Variable(0, aggregation=mode)
        assert strategy.run(lambda variable=variable: variable.assign_add(1)).item() == 1


# --- in the place of a tensor

X = torch.tensor([1.5, -2.0, 3.0])
OTHER = torch.tensor([2.0, 2.0, 0.5])
ARITHMETIC = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lt", "le", "gt", "ge", "eq", "ne",
)  # fmt: skip


@pytest.mark.parametrize("name", ARITHMETIC)
def test_a08_operators_work_on_the_value(create: Any, name: str) -> None:
    fn, variable, other = getattr(operator, name), create(X), create(OTHER)
    expected = fn(X, OTHER)
    for result in (fn(variable, OTHER), fn(variable, other), fn(X, other), fn(X, create(OTHER))):
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, expected, equal_nan=True)
    if name != "matmul":
        torch.testing.assert_close(fn(2, variable), fn(2, X), equal_nan=True)


@pytest.mark.parametrize("name", ["and_", "or_", "xor", "lshift", "rshift"])
def test_a08_bitwise_operators_work_on_the_value(create: Any, name: str) -> None:
    fn, bits, more = getattr(operator, name), torch.tensor([6, 3]), torch.tensor([1, 2])
    assert torch.equal(fn(create(bits), more), fn(bits, more))
    assert torch.equal(fn(bits, create(more)), fn(bits, more))


@pytest.mark.parametrize(
    "fn", [operator.neg, operator.pos, abs, len, list, lambda v: v[1], lambda v: v[::2], lambda v: v[v > 0]]
)
def test_a08_unary_operators_and_indexes_work_on_the_value(create: Any, fn: Callable[[Any], Any]) -> None:
    torch.testing.assert_close(fn(create(X)), fn(X))


@pytest.mark.parametrize("fn", [int, float, bool, complex, operator.index, range, "{:d}".format, operator.invert])
def test_a08_conversions_work_on_the_value(create: Any, fn: Callable[[Any], Any]) -> None:
    assert fn(create(3)) == fn(torch.tensor(3))


def test_a08_torch_functions_take_it_for_a_tensor(create: Any) -> None:
    variable = create(X)
    assert torch.equal(torch.stack([variable, variable]), torch.stack([X, X]))
    assert torch.equal(torch.relu(variable), torch.relu(X))
    assert torch.equal(torch.add(X, other=variable), X + X)
    assert torch.equal(nn.functional.linear(X, variable), nn.functional.linear(X, X))
    weight = torch.ones(3, requires_grad=True)
    (weight * variable).sum().backward()
    assert torch.equal(weight.grad, X)  # type: ignore[arg-type]


def test_a08_numpy_takes_it_for_an_array(create: Any) -> None:
    variable = create(X)
    assert np.asarray(variable).tolist() == X.tolist()
    assert np.asarray(variable, dtype=np.float64).dtype == np.float64
    assert (np.ones(3, np.float32) + variable).tolist() == (X + 1).tolist()


def test_a08_what_it_does_not_have_its_value_has(create: Any) -> None:
    variable = create(X)
    assert variable.sum().item() == 2.5
    assert variable.ndim == 1
    assert variable.tolist() == X.tolist()
    assert 3.0 in variable
    assert create(3).item() == 3
    assert f"{create(2.5):.2f}" == "2.50"
    with pytest.raises(AttributeError, match="nonsense"):
        variable.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="_hidden"):
        variable._hidden  # noqa: B018


def test_a08_what_would_change_a_copy_is_refused(create: Any) -> None:
    variable = create(X, name="w")
    with pytest.raises(AttributeError, match="'zero_' would change a copy .*'w'.*assign to it"):
        variable.zero_()
    with pytest.raises(TypeError, match="item assignment"):
        variable[0] = 1


def test_a08_sparse_read_gives_rows(create: Any) -> None:
    table = create([[1, 2], [3, 4], [5, 6]], name="table")
    assert table.sparse_read([2, 0, 2]).tolist() == [[5, 6], [1, 2], [5, 6]]
    with pytest.raises(ValueError, match="'table': expected indices of 1 dimension, got 2"):
        table.sparse_read([[0]])


def test_it_is_a_key_by_itself(create: Any) -> None:
    one, other = create(1), create(1)
    found = {one: "one", other: "other"}
    assert (found[one], found[other]) == ("one", "other")


# --- copies


def test_a13_a_deep_copy_is_a_variable_beside_it() -> None:
    strategy = on_three_ps()
    with strategy.scope():
        ps.Variable(0)
        variable = ps.Variable([1.0], name="w", trainable=False, aggregation=ps.VariableAggregation.MEAN)
        inside = copy.deepcopy(variable)
    outside, again = copy.deepcopy([variable, variable])
    assert again is outside
    variable.assign(9)
    for duplicate in (inside, outside):
        assert (duplicate.strategy, duplicate.device, duplicate.trainable) == (strategy, variable.device, False)
        assert duplicate.aggregation is ps.VariableAggregation.MEAN
        assert duplicate.value().tolist() == [1]
    assert [inside.name, outside.name] == ["w_1", "w_2"]


def test_a13_a_deep_copy_under_another_strategy_is_refused(create: Any) -> None:
    variable = create(0)
    message = "Mixing different strategies: deepcopy"
    with ps.ParameterServerStrategy().scope(), pytest.raises(RuntimeError, match=message):
        copy.deepcopy(variable)
