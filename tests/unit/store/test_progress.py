"""How far the updates of a worker have come."""

from __future__ import annotations

import pytest

from paramserver.store.progress import Progress


def make(progress: Progress, number: int, parts: int) -> int:
    """Make an update; how many of its parts were applied now."""
    if not progress.begin(number):
        return 0
    applied = 0
    while progress.done < parts:
        progress.enter_part()
        progress.leave_part()
        applied += 1
    progress.end()
    return applied


def test_an_update_is_made_once() -> None:
    progress = Progress()
    assert [make(progress, number, 2) for number in (1, 1, 3, 2, 3, 4)] == [2, 0, 2, 0, 0, 2]


def test_an_update_that_was_cut_goes_on_where_it_stopped() -> None:
    progress = Progress()
    assert progress.begin(1)
    progress.enter_part()
    progress.leave_part()
    assert make(progress, 1, 3) == 2
    assert make(progress, 1, 3) == 0


def test_an_update_that_was_cut_before_its_first_part_is_made_whole() -> None:
    progress = Progress()
    assert progress.begin(1)
    assert make(progress, 1, 3) == 3


def test_an_update_that_the_worker_gave_up_is_forgotten() -> None:
    progress = Progress()
    assert progress.begin(1)
    progress.enter_part()
    progress.leave_part()
    assert make(progress, 2, 3) == 3
    assert make(progress, 1, 3) == 0


def test_a_part_that_was_interrupted_is_told_once() -> None:
    progress = Progress()
    assert progress.begin(1)
    progress.enter_part()
    with pytest.raises(ValueError, match="in the middle of part 1"):
        progress.begin(1)
    assert not progress.begin(1)
    assert make(progress, 2, 2) == 2


def test_an_update_that_failed_is_over() -> None:
    progress = Progress()
    assert progress.begin(1)
    progress.enter_part()
    progress.end()
    assert not progress.begin(1)
