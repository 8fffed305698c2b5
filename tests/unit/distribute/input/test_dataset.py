"""What a worker reads, and what its replicas get of it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import paramserver as ps
from paramserver.distribute.input.dealing import dealing_to
from paramserver.distribute.input.options import InputReplicationMode
from paramserver.distribute.strategy import Strategy

WITH_CHIEF = {"chief": ["a:1"], "worker": ["b:1", "c:1", "d:1"], "ps": ["e:1"]}
WITHOUT_CHIEF = {"worker": ["b:1", "c:1", "d:1"], "ps": ["e:1"]}
PER_REPLICA = ps.InputOptions(replication_mode=InputReplicationMode.PER_REPLICA)


def strategy(cluster: dict[str, list[str]], task_type: str, task_id: int) -> ps.ParameterServerStrategy:
    resolver = ps.SimpleClusterResolver(ps.ClusterSpec(cluster), task_type=task_type, task_id=task_id)
    return ps.ParameterServerStrategy(resolver)


def replicas(count: int) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(count)])


def plain(part: Any) -> Any:
    """Tensors and what is distributed as lists, to compare them."""
    if isinstance(part, ps.PerReplica):
        return [plain(value) for value in part.values]
    return part.tolist() if isinstance(part, (torch.Tensor, np.ndarray)) else part


class Streamed(IterableDataset[torch.Tensor]):
    """Two batches."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(8).split(4)


class Rows:
    """As Hugging Face has it in the torch format: map-style, iterable, and no torch Dataset."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        return {"x": torch.tensor([index, index]), "text": f"row {index}"}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


# --- which part of the input a task reads


@pytest.mark.parametrize(
    ("cluster", "task", "expected"),
    [
        (WITHOUT_CHIEF, ("worker", 1), (3, 1, 1)),
        (WITH_CHIEF, ("worker", 1), (4, 2, 1)),
        (WITH_CHIEF, ("chief", 0), (4, 0, 1)),
    ],
)
def test_the_context_of_a_worker(
    cluster: dict[str, list[str]], task: tuple[str, int], expected: tuple[int, int, int]
) -> None:
    """I01."""
    assert strategy(cluster, *task).input_context == ps.InputContext(*expected)


def test_the_context_of_one_process() -> None:
    """I01."""
    assert ps.ParameterServerStrategy().input_context == ps.InputContext(1, 0, 1)
    assert replicas(2).input_context == ps.InputContext(1, 0, 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda own: own.distribute_dataset([1]),
        lambda own: own.distribute_datasets_from_function(lambda _: [1]),
        lambda own: own.make_dataset_iterator([1]),
        lambda own: own.make_input_fn_iterator(lambda _: [1]),
        lambda own: own.make_numpy_dataset(np.zeros(1)),
    ],
)
def test_a_ps_has_no_input(build: Callable[[Strategy], object]) -> None:
    """C16, I14."""
    with pytest.raises(ValueError, match="ps"):
        build(strategy(WITH_CHIEF, "ps", 0))


def test_the_batch_of_a_replica() -> None:
    """I02."""
    context = ps.InputContext(num_input_pipelines=4, input_pipeline_id=2, num_replicas_in_sync=2)
    assert context.get_per_replica_batch_size(8) == 4
    assert str(context) == "input pipeline 2 of 4"
    with pytest.raises(ValueError, match=r"batch of 9 cannot be divided evenly among 2 replicas"):
        context.get_per_replica_batch_size(9)


def test_every_worker_sees_the_whole_dataset_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """I08, W11, I07: with one replica, batches pass through untouched."""
    batches = [torch.zeros(2), torch.ones(2)]
    for worker in range(3):
        with caplog.at_level("INFO", logger="paramserver"):
            caplog.clear()
            distributed = strategy(WITHOUT_CHIEF, "worker", worker).distribute_dataset(batches)
        assert sum("reads the whole dataset, in an order of its own" in each for each in caplog.messages) == 1
        assert [id(batch) for batch in distributed] == [id(batch) for batch in batches]


def test_one_process_reads_alone_and_no_line_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="paramserver.distribute.input"):
        ps.ParameterServerStrategy().distribute_dataset([1])
    assert not [each for each in caplog.messages if "whole dataset" in each]


# --- global batches


@pytest.mark.parametrize(
    "dataset",
    [
        [torch.arange(4), torch.arange(4, 8)],
        DataLoader(range(8), batch_size=4),  # type: ignore[arg-type]  # a sequence will do
        Streamed(),
        DataLoader(Streamed(), batch_size=None),
        (batch for batch in torch.arange(8).split(4)),
        np.arange(8).reshape(2, 4).tolist(),
    ],
    ids=["list", "DataLoader", "IterableDataset", "DataLoader of batches", "generator", "lists"],
)
def test_a_global_batch_is_divided_among_the_replicas(dataset: Any) -> None:
    """I07, R05: whatever gives the batches."""
    distributed = replicas(2).distribute_dataset(dataset)
    assert [plain(batch) for batch in distributed] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_ten_numbers_in_batches_of_two_are_dealt_to_two_replicas_and_reduced() -> None:
    """H02, E17."""
    own = replicas(2)
    dealt, sums = [], []
    for batch in own.distribute_dataset(DataLoader(range(10), batch_size=2)):  # type: ignore[arg-type]
        dealt.append(plain(batch))
        sums.append([own.reduce("sum", own.run(lambda x: x, (batch,)), axis=axis).tolist() for axis in (None, 0)])
    assert dealt == [[[2 * index], [2 * index + 1]] for index in range(5)]
    assert sums == [[[total], total] for total in (1, 5, 9, 13, 17)]


def test_one_replica_gets_the_very_batches_of_the_dataset() -> None:
    """I07: whatever they are, examples too."""
    items = [torch.tensor(1), 2, "three", {"x": None}]
    assert [id(item) for item in replicas(1).distribute_dataset(items)] == [id(item) for item in items]


def test_rows_that_do_not_go_round_go_to_the_first_replicas() -> None:
    """I07."""
    (batch,) = replicas(3).distribute_dataset([torch.arange(8)])
    assert plain(batch) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [len(part) for part in torch.tensor_split(torch.arange(8), 3)] == [3, 3, 2]  # torch's own rule


def test_a_batch_of_fewer_rows_than_replicas_is_left_out_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """I07: an empty batch would make a mean loss NaN."""
    distributed = replicas(2).distribute_dataset(DataLoader(range(5), batch_size=2))  # type: ignore[arg-type]
    assert [[plain(batch) for batch in distributed] for _ in range(2)] == [[[[0], [1]], [[2], [3]]]] * 2
    assert [(each.levelname, each.message) for each in caplog.records] == [
        ("WARNING", "a batch of 1 rows is left out, like every batch with fewer rows than the 2 replicas")
    ]


def test_i06_a_last_group_of_fewer_batches_than_replicas_is_left_out_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    distributed = replicas(3).distribute_datasets_from_function(lambda _: [torch.ones(1)] * 5)
    assert [len(list(distributed)) for _ in range(2)] == [1, 1]
    assert [(each.levelname, each.message) for each in caplog.records] == [
        ("WARNING", "the last 2 batches are left out, like every group of fewer batches than the 3 replicas")
    ]


def test_a_nest_keeps_its_structure_and_its_leaves_are_divided_alike() -> None:
    """I07."""
    pair = namedtuple("pair", ["image", "names"])
    batch = {
        "x": torch.arange(6).reshape(3, 2),
        "more": [np.arange(3), None, pair(torch.ones(3), ["a", "b", "c"])],
        "texts": ("d", "e", "f"),
    }
    (dealt,) = replicas(2).distribute_dataset([batch])
    assert list(dealt) == ["x", "more", "texts"]
    array, nothing, (image, names) = dealt["more"]
    assert isinstance(dealt["more"][2], pair)
    assert plain(dealt["x"]) == [[[0, 1], [2, 3]], [[4, 5]]]
    assert plain(array) == [[0, 1], [2]]
    assert isinstance(array.values[0], np.ndarray)
    assert nothing is None
    assert plain(image) == [[1.0, 1.0], [1.0]]
    assert names.values == (["a", "b"], ["c"])
    assert dealt["texts"].values == (("d", "e"), ("f",))
    assert list(batch) == ["x", "more", "texts"]  # the caller's is as it was
    assert batch["texts"] == ("d", "e", "f")


def test_batches_may_have_any_shapes() -> None:
    """I18: none is static, and the batch is the global one."""
    batches = [torch.zeros(4, 2), torch.zeros(3, 5), torch.zeros(2)]
    shapes = [[tuple(part.shape) for part in batch.values] for batch in replicas(2).distribute_dataset(batches)]
    assert shapes == [[(2, 2), (2, 2)], [(2, 5), (1, 5)], [(1,), (1,)]]


def test_parts_are_views_and_copy_nothing() -> None:
    batch = torch.arange(4)
    (dealt,) = replicas(2).distribute_dataset([batch])
    assert dealt.values[0].data_ptr() == batch.data_ptr()


def test_a_run_on_replicas_takes_a_batch_apart() -> None:
    """I07, E03: also where a leaf is a list of texts."""
    own = replicas(2)
    (batch,) = own.distribute_dataset([{"x": torch.arange(4.0), "name": ["a", "b", "c", "d"]}])
    shown = own.run(lambda each: f"{each['x'].sum():.0f} {''.join(each['name'])}", (batch,))
    assert shown.values == ("1 ab", "5 cd")


@pytest.mark.parametrize(
    "item",
    [torch.tensor(1.0), 2, "text", (torch.zeros(4), torch.tensor(1)), {"x": np.float32(1)}, (1.0, 2.0)],
    ids=repr,
)
def test_examples_cannot_be_divided(item: Any) -> None:
    """I07: the message says to batch them."""
    with pytest.raises(ValueError, match="batch the dataset first: wrap it in a torch DataLoader with a batch_size"):
        list(replicas(2).distribute_dataset([item]))


@pytest.mark.parametrize("dataset", [TensorDataset(torch.zeros(4, 2)), Rows(), torch.zeros(4, 2)])
def test_the_items_of_a_map_style_dataset_are_examples_to_several_replicas(dataset: Any) -> None:
    """I07: said at once, since an example may well have a leading dimension."""
    with pytest.raises(ValueError, match="batch them first: wrap it in a torch DataLoader"):
        replicas(2).distribute_dataset(dataset)


@pytest.mark.parametrize(
    ("batch", "message"),
    [((torch.zeros(4), torch.zeros(3)), r"leading dimensions of \[3, 4\]"), ({}, "no tensor in it"), ([], "no tensor")],
)
def test_what_has_no_rows_in_common_cannot_be_divided(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(replicas(2).distribute_dataset([batch]))


# --- what is a dataset


def test_the_items_of_a_dataset_are_batches_to_one_replica() -> None:
    data = TensorDataset(torch.arange(4).reshape(2, 2))
    assert [[plain(x) for (x,) in replicas(1).distribute_dataset(data)] for _ in range(2)] == [[[0, 1], [2, 3]]] * 2


def test_a_hugging_face_dataset_in_torch_format_is_read_row_by_row_or_through_a_loader() -> None:
    assert [row["text"] for row in replicas(1).distribute_dataset(Rows())] == ["row 0", "row 1", "row 2", "row 3"]
    loader: DataLoader[Any] = DataLoader(Rows(), batch_size=4)  # type: ignore[arg-type]  # map-style will do
    (batch,) = replicas(2).distribute_dataset(loader)
    assert plain(batch["x"]) == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]
    assert batch["text"].values == (["row 0", "row 1"], ["row 2", "row 3"])


@pytest.mark.parametrize("wrong", [3, None, "train.csv", {"train": [1]}, Dataset()], ids=type)
def test_what_is_no_dataset_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected a DataLoader, a Dataset of batches or an iterable"):
        replicas(1).distribute_dataset(wrong)


def test_each_iteration_begins_anew() -> None:
    """I04."""
    loader = DataLoader(range(5), batch_size=2)  # type: ignore[arg-type]
    distributed = ps.ParameterServerStrategy().distribute_dataset(loader)
    assert [batch.tolist() for _ in range(2) for batch in distributed] == [[0, 1], [2, 3], [4]] * 2
    assert len(distributed) == 3


def test_an_iteration_inside_another_begins_anew_and_disturbs_nobody() -> None:
    distributed = replicas(1).distribute_dataset([1, 2])
    assert [(outer, inner) for outer in distributed for inner in distributed] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_a_generator_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(replicas(1).distribute_dataset(batch for batch in [1]))


# --- per-replica batches


def test_a_function_is_told_what_to_read_and_its_batches_are_of_a_replica() -> None:
    """I09, I06, R05: called once; a last group that is short is dropped."""
    told = []

    def fn(context: ps.InputContext) -> DataLoader[Any]:
        told.append((context, ps.in_cross_replica_context()))
        return DataLoader(range(14), batch_size=context.get_per_replica_batch_size(8))  # type: ignore[arg-type]

    distributed = replicas(2).distribute_datasets_from_function(fn)
    groups = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13]]]
    assert [[plain(batch) for batch in distributed] for _ in range(2)] == [groups, groups]
    assert told == [(ps.InputContext(1, 0, 2), True)]
    assert len(distributed) == 2
    assert len(replicas(4).distribute_datasets_from_function(fn)) == 1  # of seven batches, three are left over


def test_a_group_of_nests_is_a_nest_of_groups() -> None:
    """I09: a leaf is dealt, also where all replicas get the same object."""
    shared = torch.zeros(1)
    batches = [{"x": shared, "name": ["a", "b"]}, {"x": shared, "name": ["c"]}]
    (dealt,) = replicas(2).distribute_datasets_from_function(lambda _: batches)
    assert dealt["x"].values == (shared, shared)
    assert dealt["name"].values == (["a", "b"], ["c"])


def test_one_replica_gets_the_very_batches_of_the_function() -> None:
    """I09."""
    batches = [object(), object()]
    assert list(replicas(1).distribute_datasets_from_function(lambda _: batches)) == batches


def test_a_function_that_returns_no_dataset_is_refused() -> None:
    """I09."""
    with pytest.raises(ValueError, match="got a int"):
        replicas(2).distribute_datasets_from_function(lambda _: 3)  # type: ignore[arg-type, return-value]


# --- options


@pytest.mark.parametrize(
    "own", [replicas(2), ps.ParameterServerStrategy(), ps.get_strategy(), strategy(WITH_CHIEF, "ps", 0)], ids=repr
)
def test_no_strategy_has_input_of_each_replica(own: Strategy) -> None:
    """R02, R03, H03: checked before everything else."""
    with pytest.raises(NotImplementedError, match="PER_REPLICA"):
        own.distribute_dataset([1], PER_REPLICA)
    with pytest.raises(NotImplementedError, match="PER_REPLICA"):
        own.distribute_datasets_from_function(lambda _: [1], PER_REPLICA)


@pytest.mark.parametrize("prefetch", [True, False])
def test_options_are_for_every_strategy(prefetch: bool) -> None:
    """H03, R05, I10: on CPU devices batches are where they are computed on."""
    options = ps.InputOptions(prefetch=prefetch)
    for own in (replicas(2), ps.ParameterServerStrategy(), ps.get_strategy()):
        for distributed in (
            own.distribute_dataset([torch.zeros(2)] * 2, options),
            own.distribute_datasets_from_function(lambda _: [torch.zeros(2)] * 2, options),
        ):
            assert distributed is not None
            parts = own.local_results(next(iter(distributed)))
            assert [part.device.type for part in parts] == ["cpu"] * own.num_replicas_in_sync


@pytest.mark.parametrize("is_global", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_batches_are_brought_to_the_devices_that_compute(count: int, is_global: bool) -> None:
    """I10: tensors; what is none stays on the host."""
    dealing = dealing_to([torch.device("meta")] * count, is_global=is_global)
    batch = {"x": torch.zeros(4), "y": np.zeros(4)}
    dealt = next(dealing.deal(iter([batch, batch])))
    assert {part.device.type for part in replicas(1).local_results(dealt["x"])} == {"meta"}
    assert {type(part) for part in replicas(1).local_results(dealt["y"])} == {np.ndarray}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("prefetch", "expected"), [(True, "cuda"), (False, "cpu")])
def test_batches_are_prefetched_to_a_gpu_unless_told_not_to(prefetch: bool, expected: str) -> None:
    """I10."""
    own = ps.CentralStorageStrategy(["cuda:0"])
    (batch,) = own.distribute_dataset([torch.zeros(2).pin_memory()], ps.InputOptions(prefetch=prefetch))
    assert batch.device.type == expected


def test_a_mode_may_be_given_by_its_name() -> None:
    assert ps.InputOptions(replication_mode="PER_REPLICA") == PER_REPLICA  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"place_on_device": True}, "place_on_device=True needs replication_mode='PER_REPLICA'"),
        ({"place_on_device": True, "replication_mode": "PER_REPLICA"}, "set prefetch=False"),
        ({"prefetch": 2}, "prefetch: expected True or False, got 2"),
        ({"place_on_device": None}, "place_on_device: expected True or False, got None"),
        ({"sharding": "auto"}, "sharding: expected 'none' or 'static', got 'auto'"),
        ({"seed": -1}, "seed: expected an int from 0 on, or None, got -1"),
        ({"seed": 1.5}, "seed: expected"),
        ({"seed": True}, "seed: expected"),
        ({"replication_mode": "PER_CORE"}, "replication_mode: expected PER_WORKER or PER_REPLICA, got 'PER_CORE'"),
    ],
)
def test_options_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    """I17."""
    with pytest.raises(ValueError, match=message):
        ps.InputOptions(**fields)


def test_options_that_go_together_are_allowed() -> None:
    """I17."""
    assert ps.InputOptions(place_on_device=True, prefetch=False, replication_mode=InputReplicationMode.PER_REPLICA)


def test_what_are_no_options_is_refused() -> None:
    with pytest.raises(ValueError, match="options: expected InputOptions, got a dict"):
        replicas(1).distribute_dataset([1], {"prefetch": True})  # type: ignore[arg-type]


def test_a_function_shards_for_itself() -> None:
    with pytest.raises(ValueError, match="the function reads the part that its InputContext names"):
        replicas(1).distribute_datasets_from_function(lambda _: [1], ps.InputOptions(sharding="static"))


# --- contexts


@pytest.mark.parametrize(
    "call",
    [
        lambda own: own.distribute_dataset([1]),
        lambda own: own.distribute_datasets_from_function(lambda _: [1]),
        lambda own: own.distribute_values_from_function(lambda _: 1),
        lambda own: own.make_dataset_iterator([1]),
        lambda own: own.make_input_fn_iterator(lambda _: [1]),
        lambda own: own.make_numpy_dataset(np.zeros(1)),
    ],
)
def test_input_is_made_outside_of_replicas_and_of_other_scopes(call: Callable[[Strategy], object]) -> None:
    """X06, X07, X08."""
    own = replicas(2)
    assert call(own) is not None
    with pytest.raises(RuntimeError, match="requires being in cross-replica context"):
        own.run(lambda: call(own))
    with pytest.raises(RuntimeError, match="Mixing different strategies"), replicas(1).scope():
        call(own)


# --- values


def test_a_function_makes_a_value_for_each_replica() -> None:
    """I16: in order, and distributed also where all are equal."""
    made = replicas(2).distribute_values_from_function(lambda context: str(context))
    assert made.values == ("replica 0 of 2", "replica 1 of 2")
    same = replicas(2).distribute_values_from_function(lambda _: 7)
    assert isinstance(same, ps.PerReplica)
    assert same.values == (7, 7)


def test_one_replica_gets_a_distributed_value_too() -> None:
    """I16."""
    made = replicas(1).distribute_values_from_function(lambda context: context.num_replicas_in_sync)
    assert isinstance(made, ps.PerReplica)
    assert made.values == (1,)


def test_the_default_strategy_gives_the_value_itself() -> None:
    """I16."""
    assert ps.get_strategy().distribute_values_from_function(lambda context: context) == ps.ValueContext(0, 1)
