"""What a program does to the param groups of a prepared optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paramserver.distribute.bound.held_parameters import HeldParameters
from paramserver.errors import ConfigError


class Two:
    """Two groups of two parameters, each with a twin on another replica."""

    def __init__(self) -> None:
        self.a, self.b, self.c, self.d, self.free = each = [nn.Parameter(torch.zeros(1)) for _ in range(5)]
        self.twins = {id(one): nn.Parameter(torch.zeros(1)) for one in each}
        self.groups: list[dict[str, Any]] = [{"params": [self.a, self.b]}, {"params": [self.c, self.d]}]
        names = {id(one): name for one, name in zip(each, "abcde", strict=True)}
        self.held = HeldParameters(self.groups, names, lambda one: (one, self.twins[id(one)]))

    def changed(self) -> set[int] | None:
        return self.held.changed(self.groups)


def ids(*parameters: nn.Parameter) -> set[int]:
    return set(map(id, parameters))


def test_nothing_has_changed_at_first() -> None:
    assert Two().changed() is None


def test_what_is_taken_out_is_told_once_and_so_is_what_comes_back() -> None:
    two = Two()
    two.groups[0]["params"].remove(two.a)
    assert two.changed() == ids(two.b, two.c, two.d)
    assert two.changed() is None
    group = two.groups.pop()
    assert two.changed() == ids(two.b)
    two.groups.append(group)
    two.groups[0]["params"] = [two.b, two.a]
    assert two.changed() == ids(two.a, two.b, two.c, two.d)


def test_the_parameters_of_another_replica_are_those_of_the_first() -> None:
    two = Two()
    for group in two.groups:
        group["params"][:] = [two.twins[id(each)] for each in group["params"]]
    assert two.changed() is None
    del two.groups[0]["params"][0]
    assert two.changed() == ids(two.b, two.c, two.d)


def test_the_order_of_groups_and_parameters_is_nothing() -> None:
    two = Two()
    two.groups.reverse()
    two.groups[0]["params"].reverse()
    assert two.changed() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda two: two.groups[0]["params"].append(two.free),
            "parameter 'e' was put into a param group after prepare",
        ),
        (lambda two: two.groups[0]["params"].append(nn.Parameter(torch.zeros(2))), r"parameter of shape \[2\], which"),
        (lambda two: two.groups[0]["params"].__setitem__(0, two.free), "parameter 'e' was put into a param group"),
        (lambda two: two.groups.append({"params": [two.free]}), "parameter 'e' was put into a param group"),
        (lambda two: two.groups[0]["params"].append(two.groups[1]["params"].pop()), "'d' was moved to another param"),
        (lambda two: two.groups.__setitem__(0, dict(two.groups[0])), "a param group was replaced by another dict"),
    ],
)
def test_what_no_ps_would_follow_is_refused_at_every_step(change: Any, message: str) -> None:
    two = Two()
    change(two)
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            two.changed()
