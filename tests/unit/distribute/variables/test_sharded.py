"""Variables that are partitioned by rows: their parts, and rows of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import paramserver as ps
from paramserver.client.client import ParameterClient
from paramserver.distribute.variables.aggregating import AggregatingVariable
from paramserver.distribute.variables.plain import PlainVariable
from paramserver.distribute.variables.sharded import ShardedVariable
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.placement import FixedShards
from paramserver.server.server import play_in_process

NUM_PS = 3
CLUSTER = ps.ClusterSpec({"chief": ["a:1"], "ps": [f"b:{port}" for port in range(1, NUM_PS + 1)]})
TABLE = torch.arange(20).view(10, 2)


def partitioned(shards: int, replicas: int = 1) -> ps.ParameterServerStrategy:
    """A chief of a cluster whose ps tasks are played in this process, with a partitioner."""
    resolver = ps.SimpleClusterResolver(CLUSTER, task_type="chief", task_id=0)
    devices = [f"cpu:{index}" for index in range(replicas)]
    strategy = ps.ParameterServerStrategy(resolver, compute_devices=devices, variable_partitioner=FixedShards(shards))
    strategy.client = ParameterClient([play_in_process(index=index)() for index in range(NUM_PS)])
    return strategy


def create(shards: int, value: Any = TABLE, replicas: int = 1, **options: Any) -> Any:
    with partitioned(shards, replicas).scope():
        return ps.Variable(value, name="table", **options)


# --- creation


def test_p07_each_part_is_a_variable_of_the_next_ps() -> None:
    with partitioned(2).scope():
        variables: list[Any] = [ps.Variable(torch.zeros(4, 3), name=name) for name in ("u", "v")]
    assert [[part.ps for part in variable.variables] for variable in variables] == [[0, 1], [2, 0]]
    assert [part.name for part in variables[0].variables] == ["u/part_0", "u/part_1"]
    assert all(type(part) is PlainVariable for part in variables[1].variables)


def test_a_part_says_which_rows_of_what_it_holds() -> None:
    """So that a checkpoint can put the whole together."""
    table = create(3)
    client = table.strategy.connect()
    wanted = VariableSpec("table/part_1", (3, 2), "int64", Shard(variable="table", index=1, start=4, rows=10))
    client.variables.find(1, wanted, timeout=0)
    with pytest.raises(ps.errors.ModelMismatchError):
        client.variables.find(1, VariableSpec("table/part_1", (3, 2), "int64"), timeout=0)


def test_it_looks_like_one_variable() -> None:
    """V2-05: shape, dtype, parts, iteration, and the value as a whole."""
    table = create(3, trainable=False)
    assert isinstance(table, ShardedVariable)
    assert isinstance(table, ps.Variable)
    assert (table.name, table.shape, table.dtype, table.trainable) == ("table", TABLE.shape, torch.int64, False)
    assert [part.shape[0] for part in table] == [4, 3, 3]
    assert list(table) == list(table.variables)
    assert len(table) == 10
    assert torch.equal(table.value(), TABLE)
    assert torch.equal(table + 1, TABLE + 1)
    assert np.asarray(table).tolist() == TABLE.tolist()
    assert repr(table) == (
        "<ps.Variable 'table' int64[10, 2] in 3 parts on /job:ps/task:0/device:CPU:0, "
        "/job:ps/task:1/device:CPU:0, /job:ps/task:2/device:CPU:0>"
    )


@pytest.mark.parametrize(("shards", "value"), [(1, TABLE), (4, 3.0), (4, torch.zeros(1, 5))])
def test_a_scalar_and_a_variable_of_one_part_stay_whole(shards: int, value: Any) -> None:
    assert type(create(shards, value)) is PlainVariable


def test_a_colocated_variable_stays_whole() -> None:
    """P04: on the ps of the first rows of what it is beside."""
    strategy = partitioned(3)
    with strategy.scope():
        ps.Variable(0)
        table = ps.Variable(TABLE)
        with strategy.extended.colocate_vars_with(table):
            beside = ps.Variable(TABLE)
    assert type(beside) is PlainVariable
    assert beside.ps == table.ps == 1
    assert beside.device == table.device


@pytest.mark.parametrize("variables", [[], [torch.zeros(2)], [None]])
def test_v2_05_parts_are_variables(variables: Any) -> None:
    with pytest.raises(TypeError, match="'whole': expected at least one part, and variables only"):
        ShardedVariable(variables, "whole")


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(())])
def test_v2_05_parts_are_alike(other: torch.Tensor) -> None:
    with ps.ParameterServerStrategy().scope():
        parts: list[Any] = [ps.Variable(torch.zeros(2, 2)), ps.Variable(other)]
    with pytest.raises(ValueError, match="'whole': its parts may differ in the number of rows only"):
        ShardedVariable(parts, "whole")


# --- assigning


def test_v2_05_it_is_assigned_by_rows() -> None:
    table = create(3)
    assert torch.equal(table.assign_add(TABLE), 2 * TABLE)
    assert torch.equal(table.assign_sub(1), 2 * TABLE - 1)
    assert torch.equal(table.assign(TABLE.flip(0)), TABLE.flip(0))
    assert torch.equal(table.variables[1].value(), TABLE.flip(0)[4:7])
    with pytest.raises(ValueError, match=r"'table': expected a value of int64\[10, 2\], got int64\[9, 2\]"):
        table.assign(TABLE[1:])


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_p08_an_assignment_of_replicas_updates_every_part(replicas: int) -> None:
    table = create(3, torch.zeros(10, 2), replicas, aggregation=ps.VariableAggregation.SUM)
    assert type(table) is (AggregatingVariable if replicas > 1 else ShardedVariable)
    table.strategy.run(lambda: table.assign_add(torch.ones(10, 2)))
    for part in table:
        assert part.value().unique().tolist() == [replicas]
    assert table[7].tolist() == [replicas] * 2
    assert len(table) == 10


def test_an_update_gets_the_whole() -> None:
    table = create(3, replicas=2)
    assert table.strategy.extended.update(table, lambda whole: whole.assign_add(1)).sum() == TABLE.sum() + 20
    assert type(table.get()) is ShardedVariable


# --- indexing

ROWS = [*range(-10, 10)]
SLICES = [
    slice(start, stop, step)
    for start in (None, 0, 3, 4, 9, 12, -1, -7, -12)
    for stop in (None, 0, 4, 7, 10, 12, -1, -4, -12)
    for step in (None, 1, 2, 3, 5, 9, 20, -1, -2, -4, -20)
]


@pytest.mark.parametrize("shards", [2, 3, 4, 5, 10])
def test_v2_05_rows_are_those_of_an_array(shards: int) -> None:
    """V2-06: also the first row of every part; ints, negative ones, and slices of any step."""
    table, array = create(shards), TABLE.numpy()
    for row in ROWS:
        assert table[row].tolist() == array[row].tolist(), row
        assert table[np.int64(row)].tolist() == array[row].tolist(), row
    for each in SLICES:
        found = table[each]
        assert found.shape == array[each].shape, each
        assert found.tolist() == array[each].tolist(), each


@pytest.mark.parametrize("shards", [3, 5])
@pytest.mark.parametrize(
    "key",
    [
        (4, 1), (slice(2, 8), 0), (slice(8, 2, -3), slice(1)), ..., (..., 1), (None, 3), (3, ...), (slice(None), None),
        TABLE[:, 0] > 7, (TABLE > 7).numpy(), [True, False] * 5, (np.array([False, True] * 5), 1), (), (-1, -1),
    ],
    ids=str,
)  # fmt: skip
def test_v2_05_other_indexes_are_those_of_an_array(shards: int, key: Any) -> None:
    expected = TABLE.numpy()[key]
    found = create(shards)[key]
    assert found.tolist() == expected.tolist()
    assert tuple(found.shape) == expected.shape


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (10, IndexError, "'table' has 10 rows, got index 10"),
        (-11, IndexError, "got index -11"),
        ((10, 0), IndexError, "got index 10"),
        ([True], IndexError, "mask"),
        (slice(None, None, 0), ValueError, "step"),
        (slice(torch.tensor(1), None), TypeError, "'table' is partitioned: expected ints in the slice .* got a Tensor"),
        (slice(None, np.array(3)), TypeError, "got a ndarray"),
        ((slice(None, None, torch.tensor(2)), 0), TypeError, "got a Tensor"),
        (slice(1.0, None), TypeError, "got a float"),
        (torch.tensor([0]), TypeError, "'table' is partitioned: expected an int.*got Tensor; see sparse_read"),
        (torch.tensor(0), TypeError, "got Tensor"),
        ([0, 1], TypeError, "got list"),
        (np.array([0, 1]), TypeError, "got ndarray"),
        (1.0, TypeError, "got float"),
        ("0", TypeError, "got str"),
    ],
)
def test_v2_05_an_index_that_is_none_is_refused(key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create(3)[key]


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        (0, [1, 0, 0]), (3, [1, 0, 0]), (4, [0, 1, 0]), (-1, [0, 0, 1]), (slice(2, 6), [2, 2, 0]),
        (slice(None, None, -9), [1, 0, 1]), (slice(5, 5), [0, 0, 0]), (slice(8, 1, -2), [1, 3, 1]),
    ],
)  # fmt: skip
def test_only_the_rows_that_are_wanted_are_read(key: Any, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parts of 4, 3 and 3 rows."""
    table = create(3)
    read = [0, 0, 0]
    original = PlainVariable.rows

    def counting(part: PlainVariable, start: int, stop: int) -> torch.Tensor:
        read[part.ps] += stop - start
        return original(part, start, stop)

    monkeypatch.setattr(PlainVariable, "rows", counting)
    table[key]
    assert read == rows


def test_v2_05_sparse_read_takes_indices_of_one_dimension() -> None:
    table = create(3)
    assert table.sparse_read(torch.tensor([9, 0, 4])).tolist() == TABLE[[9, 0, 4]].tolist()
    with pytest.raises(ValueError, match="expected indices of 1 dimension"):
        table.sparse_read(3)
