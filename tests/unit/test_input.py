"""What a worker reads."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

import paramserver as ps
from paramserver.distribute.input import DistributedDataset

WITH_CHIEF = {"chief": ["a:1"], "worker": ["b:1", "c:1", "d:1"], "ps": ["e:1"]}
WITHOUT_CHIEF = {"worker": ["b:1", "c:1", "d:1"], "ps": ["e:1"]}


def strategy(cluster: dict[str, list[str]], task_type: str, task_id: int) -> ps.ParameterServerStrategy:
    resolver = ps.SimpleClusterResolver(ps.ClusterSpec(cluster), task_type=task_type, task_id=task_id)
    return ps.ParameterServerStrategy(resolver)


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


def test_a_ps_has_no_input() -> None:
    """C16, I14."""
    with pytest.raises(ValueError, match="ps"):
        strategy(WITH_CHIEF, "ps", 0).distribute_dataset([1])


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
        assert sum("reads the whole dataset" in record.message for record in caplog.records) == 1
        assert [id(batch) for batch in distributed] == [id(batch) for batch in batches]


def test_each_iteration_begins_anew() -> None:
    loader = DataLoader(range(5), batch_size=2)
    distributed = ps.ParameterServerStrategy().distribute_dataset(loader)
    assert [batch.tolist() for _ in range(2) for batch in distributed] == [[0, 1], [2, 3], [4]] * 2
    assert len(distributed) == 3


def test_a_generator_has_no_length() -> None:
    def batches() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError):
        len(DistributedDataset(batches()))
