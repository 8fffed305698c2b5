"""Iterators that are asked for one element after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import paramserver as ps
from paramserver.distribute.input.iterators import DistributedIterator, ElementSpec

WORKERS = {"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["e:1"]}


def replicas(count: int) -> ps.CentralStorageStrategy:
    return ps.CentralStorageStrategy([f"cpu:{index}" for index in range(count)])


def counter(end: int) -> Callable[[], int]:
    """A callable that gives 0, 1, ... and raises StopIteration at its end."""
    return iter(range(end)).__next__


def values(elements: Iterator[Any]) -> list[Any]:
    return [element.values if isinstance(element, ps.PerReplica) else element for element in elements]


# --- of a dataset


def test_a_dataset_iterator_divides_global_batches() -> None:
    """I07, R05: and begins anew when it is initialized (I04)."""
    iterator = replicas(2).make_dataset_iterator(DataLoader(range(6), batch_size=4))  # type: ignore[arg-type]
    expected = [[[0, 1], [2, 3]], [[4], [5]]]
    assert [[part.tolist() for part in batch.values] for batch in iterator] == expected
    with pytest.raises(StopIteration):
        iterator.get_next()
    iterator.initialize()
    assert [[part.tolist() for part in batch.values] for batch in iterator] == expected


def test_a_dataset_iterator_refuses_examples() -> None:
    """I07."""
    with pytest.raises(ValueError, match="batch the dataset first"):
        replicas(2).make_dataset_iterator([1, 2]).get_next()


def test_nothing_is_read_before_the_first_element_is_asked_for() -> None:
    read = []

    def batches() -> Iterator[int]:
        read.append("begun")
        yield 1

    iterator = replicas(1).make_dataset_iterator(batches())
    assert not read
    assert iterator.get_next() == 1


# --- of an input function


@pytest.mark.parametrize(("task", "expected"), [(("chief", 0), (3, 0)), (("worker", 1), (3, 2))])
def test_an_input_function_is_called_once_in_the_scope_with_the_context(
    task: tuple[str, int], expected: tuple[int, int]
) -> None:
    """I03."""
    resolver = ps.SimpleClusterResolver(ps.ClusterSpec(WORKERS), task_type=task[0], task_id=task[1])
    own = ps.ParameterServerStrategy(resolver)
    told = []

    def input_fn(context: ps.InputContext) -> list[int]:
        told.append((context, ps.get_strategy()))
        return [1, 2]

    iterator = own.make_input_fn_iterator(input_fn)
    assert told == [(ps.InputContext(*expected, 1), own)]
    assert list(iterator) == [1, 2]
    iterator.initialize()
    assert list(iterator) == [1, 2]
    assert len(told) == 1


def test_elements_are_dealt_in_order_and_a_restart_begins_anew() -> None:
    """I04, I06."""
    iterator = replicas(2).make_input_fn_iterator(lambda _: range(100))
    assert values(iterator) == [(first, first + 1) for first in range(0, 100, 2)]
    with pytest.raises(StopIteration):
        iterator.get_next()
    iterator.initialize()
    assert iterator.get_next().values == (0, 1)
    iterator.initialize()
    assert iterator.get_next().values == (0, 1)


def test_a_tail_that_does_not_go_round_is_dropped() -> None:
    """I06."""
    iterator = replicas(3).make_input_fn_iterator(lambda _: range(8))
    assert values(iterator) == [(0, 1, 2), (3, 4, 5)]
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("count", [1, 2])
def test_a_callable_is_called_once_for_each_replica_in_a_step(count: int) -> None:
    """I05: initialize does nothing, and a source at its end stays there."""
    calls = []

    def fn() -> int:
        calls.append(len(calls))
        if len(calls) > 4:
            raise StopIteration
        return calls[-1]

    iterator = replicas(count).make_input_fn_iterator(lambda _: fn)
    assert values(iter([iterator.get_next()])) == ([0] if count == 1 else [(0, 1)])
    assert len(calls) == count
    iterator.initialize()
    assert values(iterator) == ([1, 2, 3] if count == 1 else [(2, 3)])
    iterator.initialize()
    for _ in range(2):
        with pytest.raises(StopIteration):
            iterator.get_next()


def test_what_a_callable_raises_reaches_the_program() -> None:
    """I05."""

    def fn() -> int:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        replicas(2).make_input_fn_iterator(lambda _: fn).get_next()


@pytest.mark.parametrize("wrong", [None, 3, {"x": [1]}], ids=repr)
def test_an_input_function_returns_a_dataset_or_a_callable(wrong: Any) -> None:
    """I03."""
    with pytest.raises(ValueError, match="must return a dataset of batches or a callable"):
        replicas(1).make_input_fn_iterator(lambda _: wrong)


@pytest.mark.parametrize("mode", ["PER_REPLICA", "none", None])
def test_other_modes_are_not_supported(mode: Any) -> None:
    """R04."""
    with pytest.raises(ValueError, match="Input replication mode not supported"):
        replicas(2).make_input_fn_iterator(lambda _: [1], mode)


# --- elements


def test_replicas_compute_on_what_an_iterator_gives() -> None:
    """E17."""
    own = replicas(2)
    iterator = own.make_input_fn_iterator(lambda _: counter(4))
    assert own.run(lambda x: x * 10, (iterator.get_next(),)).values == (0, 10)
    assert own.run(lambda x: x * 10, (iterator.get_next(),)).values == (20, 30)


@pytest.mark.parametrize("ask", [DistributedIterator.get_next, DistributedIterator.get_next_as_optional, next])
def test_a_replica_cannot_ask_for_elements(ask: Callable[[Any], Any]) -> None:
    """I12."""
    own = replicas(2)
    iterator = own.make_dataset_iterator([torch.arange(2)])
    with pytest.raises(ValueError, match="should be called from outside of replica_fn"):
        own.run(lambda: ask(iterator))
    with own.scope():
        assert ask(iterator) is not None


def test_an_optional_is_none_at_the_end() -> None:
    """I13."""
    iterator = replicas(1).make_dataset_iterator([1, 2])
    assert [iterator.get_next_as_optional() for _ in range(4)] == [1, 2, None, None]


def test_the_spec_of_elements_is_told_by_one_that_is_not_lost() -> None:
    """I13."""
    batch = {"x": torch.zeros(4, 3), "y": np.zeros(4, np.int64), "name": ["a", "b", "c", "d"], "more": [None]}
    iterator = replicas(1).make_dataset_iterator([batch, batch])
    spec = {
        "x": ElementSpec((4, 3), torch.float32),
        "y": ElementSpec((4,), np.dtype(np.int64)),
        "name": ElementSpec((4,), str),
        "more": [ElementSpec((), type(None))],
    }
    assert iterator.element_spec == spec
    assert list(iterator) == [batch, batch]
    assert iterator.element_spec == spec


def test_the_spec_of_distributed_elements_is_distributed() -> None:
    """I13: the parts of a batch may differ."""
    iterator = replicas(2).make_dataset_iterator([torch.zeros(3)])
    assert iterator.element_spec.values == (ElementSpec((2,), torch.float32), ElementSpec((1,), torch.float32))
    assert iterator.get_next().values[1].shape == (1,)


def test_the_spec_of_elements_survives_an_initialization_that_does_nothing() -> None:
    """I13, I05."""
    iterator = replicas(1).make_input_fn_iterator(lambda _: counter(2))
    assert iterator.element_spec == ElementSpec((), int)
    iterator.initialize()
    assert list(iterator) == [0, 1]


def test_nothing_has_no_spec() -> None:
    """I13."""
    with pytest.raises(ValueError, match="no element is left"):
        _ = replicas(1).make_dataset_iterator([]).element_spec
