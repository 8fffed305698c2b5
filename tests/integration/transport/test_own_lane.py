"""A lane of another package: it is found by its name, passes the kit, and carries a model to a real ps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.toys.installed import install
from tests.toys.unix_lane import KIND
from torch import nn

import paramserver as ps
from paramserver.errors import ConfigError
from paramserver.layout.lanes import AUTO, AUTOMATIC, check_lane, lane_names
from paramserver.testing import CONNECTION_CHECKS, LANE_CHECKS, LocalCluster, over_sockets
from paramserver.transport.lanes import lane_kind


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = "unix = tests.toys.unix_lane:KIND"
    monkeypatch.syspath_prepend(install(tmp_path, "toy-lanes", paramserver_lanes=point))


@pytest.mark.parametrize("check", [*LANE_CHECKS, *CONNECTION_CHECKS], ids=lambda check: check.__name__)
def test_it_passes_the_kit(check):
    check(over_sockets(KIND))


@pytest.mark.usefixtures("_installed")
def test_it_is_found_by_its_name():
    assert lane_names() == (AUTO, "shared-memory", "tcp", "unix")
    check_lane("unix", "lane")
    assert lane_kind("unix") is KIND


def test_every_row_of_the_registry_names_a_kind():
    assert [lane_kind(name).is_local for name in AUTOMATIC] == [True, False]


@pytest.mark.usefixtures("_installed")
def test_a_name_that_is_not_a_lanes_is_refused():
    with pytest.raises(ConfigError, match="lane: expected one of auto, shared-memory, tcp, unix, got 'rdma'"):
        check_lane("rdma", "lane")


def test_an_entry_point_that_names_something_else_is_refused(tmp_path, monkeypatch):
    point = "wrong = tests.toys.unix_lane:UnixLane"
    monkeypatch.syspath_prepend(install(tmp_path, "toy-lanes", paramserver_lanes=point))
    with pytest.raises(ConfigError, match="lane 'wrong': tests.toys.unix_lane:UnixLane is not a LaneKind"):
        lane_kind("wrong")


@pytest.fixture
def cluster(_installed: None) -> Iterator[LocalCluster]:
    with LocalCluster(ps=2, workers=1, lane="unix") as cluster:
        yield cluster


def test_a_model_trains_over_it(cluster, monkeypatch):
    monkeypatch.setenv("PARAMSERVER_LANE", "unix")
    torch.manual_seed(0)
    model, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
    prepared, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [lane.name for lane in strategy.client.lanes.each()] == ["unix socket"] * 2
    for each, step in ((prepared, optimizer), (plain, torch.optim.SGD(plain.parameters(), lr=0.1))):
        for _ in range(3):
            step.zero_grad()
            each(torch.arange(6.0).view(2, 3)).square().sum().backward()
            step.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    strategy.close()
