"""Work on many blocks, side by side."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from paramserver.memory.side_by_side import LEAST_ACTIONS, side_by_side
from paramserver.memory.torch_internals import one_thread_here


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch uses meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_action_is_carried_out_once(num_threads: int) -> None:
    done: list[int] = []
    for count in (0, 1, 2, 100):
        done.clear()
        side_by_side([partial(done.append, number) for number in range(count)])
        assert sorted(done) == list(range(count))


def test_as_many_actions_at_once_as_torch_has_threads_each_with_one(num_threads: int) -> None:
    together = threading.Barrier(num_threads)
    numbers: list[int] = []

    def action() -> None:
        together.wait(30.0)
        numbers.append(torch.get_num_threads())

    rounds = LEAST_ACTIONS
    side_by_side([action] * rounds * num_threads)
    assert numbers == [1] * rounds * num_threads
    assert torch.get_num_threads() == num_threads


def test_after_an_error_no_action_is_begun_and_the_error_is_raised(num_threads: int) -> None:
    begun: list[int] = []

    def action(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise ValueError("number 1")

    with pytest.raises(ValueError, match="number 1"):
        side_by_side([partial(action, number) for number in range(1000)])
    assert len(begun) < 1000


def test_one_thread_is_for_this_thread_only() -> None:
    import sklearn.utils  # noqa: F401  # which has an OpenMP of its own

    before = torch.get_num_threads()
    seen: list[int] = []
    with contextlib.ExitStack() as stack:
        torch.set_num_threads(2)
        stack.callback(torch.set_num_threads, before)
        with one_thread_here():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert torch.get_num_threads() == 2
    assert seen == [2]
