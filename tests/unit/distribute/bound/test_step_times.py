"""Where the time of a worker's steps goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import paramserver as ps
from paramserver.client.client import PushTimes
from paramserver.distribute.bound.step_times import StepClock, StepTimes


def test_all_time_is_accounted_for() -> None:
    clock = StepClock([])
    begun = clock.entered()
    clock.left(begun, reducing=0.0)
    first = clock.times()
    again = clock.entered()
    clock.left(again, reducing=0.25)
    both = clock.times()
    assert both.steps == 2
    assert both.computing + both.reducing + both.blocked >= first.computing + first.blocked
    assert both.reducing == 0.25


def test_what_has_come_since_an_earlier_look() -> None:
    earlier = StepTimes(1, 0.5, 0.25, 1.0, (PushTimes("ps:0", 1.0, 2.0, 0.5),))
    later = StepTimes(3, 2.5, 0.75, 1.0, (PushTimes("ps:0", 2.0, 2.0, 1.5),))
    since = later.since(earlier)
    assert since == StepTimes(2, 2.0, 0.5, 0.0, (PushTimes("ps:0", 1.0, 0.0, 1.0),))
    assert since.per_step() == {
        "computing": 1.0, "reducing": 0.25, "blocked": 0.0,
        "ps:0/sending": 0.5, "ps:0/waiting": 0.0, "ps:0/applying": 0.5,
    }  # fmt: skip


def test_no_step_takes_no_time() -> None:
    assert set(StepClock([]).times().per_step().values()) == {0.0}


def test_a_look_at_a_run_stays_what_it_was() -> None:
    strategy, model = ps.ParameterServerStrategy(), nn.Linear(3, 1)
    model, optimizer = strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))
    looks = [strategy.statistics()]
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        looks.append(strategy.statistics())
    assert [look.steps for look in looks] == [0, 1, 2]
    assert 0 == looks[0].servers[0].applying < looks[1].servers[0].applying < looks[2].servers[0].applying
    strategy.close()
    assert strategy.statistics() == looks[-1]


def test_without_a_model_there_are_no_steps() -> None:
    with pytest.raises(RuntimeError, match="has prepared no model"):
        ps.ParameterServerStrategy().statistics()
