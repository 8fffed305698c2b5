"""Signs of life, with a clock that moves by hand."""

from __future__ import annotations

from paramserver.store.liveness import Liveness, Silent

OLD, NEW = "the old connection", "the new one"


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_worker_is_silent_once_its_time_is_over() -> None:
    clock = Clock()
    liveness = Liveness(clock)
    liveness.beat("worker:0", "one", 30.0, OLD)
    liveness.beat("worker:1", "two", 60.0, OLD)
    clock.now += 30.0
    assert liveness.take_silent() == []
    clock.now += 1.0
    assert liveness.take_silent() == [Silent("worker:0", "one", 30.0)]
    assert liveness.take_silent() == []


def test_nothing_is_expected_of_a_connection_that_has_ended() -> None:
    clock = Clock()
    liveness = Liveness(clock)
    liveness.beat("worker:0", "one", 30.0, OLD)
    liveness.forget("one", OLD)
    clock.now += 60.0
    assert liveness.take_silent() == []


def test_the_end_of_an_old_connection_does_not_hide_the_silence_of_the_new_one() -> None:
    clock = Clock()
    liveness = Liveness(clock)
    liveness.beat("worker:0", "one", 30.0, OLD)
    liveness.beat("worker:0", "one", 30.0, NEW)
    liveness.forget("one", OLD)
    clock.now += 60.0
    assert liveness.take_silent() == [Silent("worker:0", "one", 30.0)]


def test_an_old_connection_that_never_ends_is_no_silence_while_the_new_one_beats() -> None:
    clock = Clock()
    liveness = Liveness(clock)
    liveness.beat("worker:0", "one", 30.0, OLD)
    clock.now += 20.0
    liveness.beat("worker:0", "one", 30.0, NEW)
    clock.now += 20.0
    assert liveness.take_silent() == []
