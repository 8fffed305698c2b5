"""An update rule of another package: it passes the kit, and trains a model and a table on real ps tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.toys.installed import install
from tests.toys.signum import Signum
from torch import Tensor, nn

import paramserver as ps
from paramserver.errors import ConfigError, UnsupportedOptimizerError
from paramserver.layout.rules import RULES, Rule, describe, find_rule
from paramserver.testing import RULE_CHECKS, LocalCluster
from paramserver.testing.rule_kit import check_every_element_is_for_itself

BUILT_IN = [rule.optimizer for rule in RULES.values()]


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(install(tmp_path, "toy-rules", paramserver_rules="Signum = tests.toys.signum:Signum"))
    return tmp_path


checks = pytest.mark.parametrize("check", RULE_CHECKS, ids=lambda check: check.__name__)


@checks
@pytest.mark.usefixtures("_installed")
def test_it_passes_the_kit(check):
    check(lambda parameters: Signum(parameters, lr=0.1, discount=0.5))


@checks
@pytest.mark.parametrize("optimizer", BUILT_IN, ids=lambda each: each.__name__)
def test_every_rule_passes_the_kit(check, optimizer):
    check(lambda parameters: optimizer(parameters, lr=0.1))


class Blending(Signum):
    """Mixes elements, which no rule may."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad.mean(), alpha=0.1)


def test_the_kit_finds_a_rule_that_is_not_elementwise(tmp_path, monkeypatch):
    point = f"Blending = {__name__}:Blending"
    monkeypatch.syspath_prepend(install(tmp_path, "wrong-rules", paramserver_rules=point))
    with pytest.raises(AssertionError, match="two slices of a parameter"):
        check_every_element_is_for_itself(Blending)


class Model(nn.Module):
    """A table and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=True)
        self.head = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids)).square().sum()


@pytest.fixture(params=["one process", "auto", "tcp"])
def strategy(
    request: pytest.FixtureRequest, _installed: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ps.ParameterServerStrategy]:
    if request.param == "one process":
        yield ps.ParameterServerStrategy()
        return
    monkeypatch.setenv("PARAMSERVER_LANE", request.param)
    with LocalCluster(ps=2, workers=1) as cluster:
        strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
        yield strategy
        strategy.close()


def test_a_model_and_a_table_train_by_it(strategy, tmp_path):
    """As in one process with plain PyTorch, where rows without a gradient rest."""
    torch.manual_seed(0)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    kinds = [(module, Signum(module.parameters(), lr=0.1)) for module in (model.table, model.head)]
    model, optimizers = strategy.prepare(model, [optimizer for _, optimizer in kinds])
    ids = torch.tensor([1, 4])
    rows = nn.Parameter(plain.table.weight.detach()[ids].clone())
    by_hand = Signum([rows], lr=0.1), Signum(plain.head.parameters(), lr=0.1)
    for _ in range(4):
        for optimizer in (*optimizers, *by_hand):
            optimizer.zero_grad()
        model(ids).backward()
        plain.head(rows).square().sum().backward()
        for optimizer in (*optimizers, *by_hand):
            optimizer.step()
    assert torch.allclose(model.table(ids), rows, atol=1e-6)
    assert torch.allclose(model.head.weight, plain.head.weight, atol=1e-6)
    strategy.save(tmp_path / "run")
    strategy.restore(tmp_path / "run")
    assert torch.allclose(model.table(ids), rows, atol=1e-6)


def test_a_ps_without_it_names_the_package():
    rule = Rule("Signum", {"lr": 0.1}, "toy-rules")
    with pytest.raises(UnsupportedOptimizerError, match="'Signum' here; install the package 'toy-rules'"):
        find_rule(rule)


def test_a_worker_without_its_entry_point_says_how_a_rule_is_found():
    with pytest.raises(UnsupportedOptimizerError, match=r"Signum cannot run.*entry point paramserver\.rules"):
        describe(Signum([nn.Parameter(torch.zeros(1))]), 0)


def test_an_entry_point_that_names_something_else_is_refused(tmp_path, monkeypatch):
    point = "Signum = tests.toys.unix_lane:KIND"
    monkeypatch.syspath_prepend(install(tmp_path, "toy-rules", paramserver_rules=point))
    with pytest.raises(ConfigError, match=r"package 'toy-rules' names .*expected a subclass of"):
        find_rule(Rule("Signum", {}))
