"""A1: the state of an optimizer goes from torch to the ps tasks and back, bit for bit, for every rule."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.patience import patience
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook

import paramserver as ps
from paramserver.errors import ConfigError
from paramserver.layout import rules
from paramserver.layout.blocks import BLOCK
from paramserver.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.usefixtures("each_strategy_is_a_process")

Make = Callable[[], ps.ParameterServerStrategy]
Optimizer = Callable[[list[dict[str, Any]]], optim.Optimizer]

# To test a new rule, add a row. Fused, because the ps tasks run torch's fused kernels where there are any.
ROWS: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True}),
    (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1, "lr_decay": 0.01, "fused": True}),
    (optim.Adam, {"lr": 0.01, "fused": True}),
    (optim.Adam, {"lr": 0.01, "amsgrad": True, "fused": True}),
    (optim.AdamW, {"lr": 0.01, "fused": True}),
    (optim.Adamax, {"lr": 0.01}),
    (optim.NAdam, {"lr": 0.01}),
    (optim.RAdam, {"lr": 0.01}),
    (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    (optim.Rprop, {"lr": 0.01}),
    (optim.ASGD, {"lr": 0.01, "t0": 2.0}),
    (optim.Adadelta, {"lr": 0.5}),
]
TABLE_ROWS: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1}),
    (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}),
    (optim.SparseAdam, {"lr": 0.01}),
]
STEPS = 3


def test_every_rule_has_a_row() -> None:
    assert {kind.__name__ for kind, _ in ROWS} == {name for name, rule in rules.RULES.items() if rule.is_dense}
    assert {kind.__name__ for kind, _ in TABLE_ROWS} == {name for name, rule in rules.RULES.items() if rule.row_slots}


def ids(row: Any) -> str:
    return row.__name__ if isinstance(row, type) else "-".join(row)


@pytest.fixture(params=["in process", "1 ps auto", "2 ps auto", "2 ps tcp"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes strategies, each of a run of its own: in one process, or as the chief of a cluster."""
    runs: list[tuple[ps.ParameterServerStrategy, LocalCluster]] = []

    def strategy(**options: Any) -> ps.ParameterServerStrategy:
        if request.param == "in process":
            return ps.ParameterServerStrategy(**options)
        num_ps, _, lane = request.param.split()
        monkeypatch.setenv("PARAMSERVER_LANE", lane)
        cluster = LocalCluster(ps=int(num_ps), workers=1).__enter__()
        made = ps.ParameterServerStrategy(cluster.resolver("chief:0"), session_creation_timeout=patience(30), **options)
        runs.append((made, cluster))
        return made

    yield strategy
    for made, cluster in runs:
        made.close()
        cluster.__exit__(None, None, None)


class Net(nn.Module):
    """Weights of several shapes: a scalar, one of several blocks, one that is frozen.

    All but the scalar, the last one, fill vector registers: fused kernels round differently behind the last whole one.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.large = nn.Parameter(torch.randn(BLOCK // 64 + 16, 64, generator=generator))
        self.weight = nn.Parameter(torch.randn(16, 16, generator=generator))
        self.frozen = nn.Parameter(torch.randn(16, generator=generator), requires_grad=False)
        self.seldom = nn.Parameter(torch.randn(32, generator=generator))
        self.scalar = nn.Parameter(torch.randn((), generator=generator))


def built(row: tuple[type[optim.Optimizer], dict[str, Any]]) -> tuple[Net, optim.Optimizer]:
    """A model, and an optimizer of it with two groups."""
    net = Net()
    first, second = [net.large, net.frozen], [net.weight, net.seldom, net.scalar]
    kind, settings = row
    return net, kind([{"params": first}, {"params": second, "lr": 0.05}], **settings)  # type: ignore[call-arg]


def train(net: Net, optimizer: optim.Optimizer, first: int, count: int = STEPS) -> None:
    """Make steps by gradients that depend on nothing but the number of the step."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = None if name == "seldom" and step % 2 else gradient
        optimizer.step()


def saved(*parts: nn.Module | optim.Optimizer) -> list[dict[str, Any]]:
    """What torch.save writes of them, read again."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    found: list[dict[str, Any]] = torch.load(file, weights_only=True)
    return found


def check_same(one: Any, other: Any, where: str = "state") -> None:
    """The same values, types and dtypes, bit for bit."""
    assert type(one) is type(other) or {type(one), type(other)} == {Tensor, nn.Parameter}, where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert one.shape == other.shape, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            check_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            check_same(*pair, f"{where}/{index}")
    else:
        assert one == other, where


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join([row[0].__name__, *map(str, row[1])]))
@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_from_torch_and_back(row: Any, before: bool, make: Make) -> None:
    net, optimizer = built(row)
    train(net, optimizer, 0)
    weights, state = saved(net, optimizer)
    train(net, optimizer, STEPS)
    expected = saved(net, optimizer)
    train(net, optimizer, 2 * STEPS)
    at_end = saved(net, optimizer)

    ours, plain = built(row)
    ours.load_state_dict(weights)
    if before:
        plain.load_state_dict(state)
    ours, prepared = make().prepare(ours, plain)
    if not before:
        prepared.load_state_dict(state)
    check_same(saved(prepared)[0], state)
    train(ours, prepared, STEPS)
    found = saved(ours, prepared)
    check_same(found, expected)

    back, optimizer = built(row)
    back.load_state_dict(found[0])
    optimizer.load_state_dict(found[1])
    train(back, optimizer, 2 * STEPS)
    check_same(saved(back, optimizer), at_end)


class Words(nn.Module):
    """A table, and a bias beside it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = nn.Embedding(40, 8, sparse=True, _weight=torch.randn(40, 8, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).square().sum()  # type: ignore[no-any-return]  # of a module


def look_up(words: Words, optimizer: optim.Optimizer, first: int, count: int = STEPS) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        words(torch.randperm(40, generator=generator)[:7]).backward()
        optimizer.step()


@pytest.mark.parametrize("row", TABLE_ROWS, ids=lambda row: row[0].__name__)
@pytest.mark.parametrize("parts", [1, 3])
def test_tables_from_torch_and_back(row: Any, parts: int, make: Make) -> None:
    kind, settings = row

    def new() -> tuple[Words, optim.Optimizer]:
        words = Words()
        return words, kind(words.parameters(), **settings)

    words, optimizer = new()
    look_up(words, optimizer, 0)
    weights, state = saved(words, optimizer)
    look_up(words, optimizer, STEPS)
    expected = saved(words, optimizer)

    ours, plain = new()
    ours.load_state_dict(weights)
    plain.load_state_dict(state)
    ours, prepared = make(variable_partitioner=ps.placement.FixedShards(parts)).prepare(ours, plain)
    check_same(saved(prepared)[0], state)
    look_up(ours, prepared, STEPS)
    if kind is optim.Adagrad:  # which rounds differently: it is fused on the ps tasks, and not for torch's tables
        torch.testing.assert_close(saved(ours, prepared), expected)
    else:
        check_same(saved(ours, prepared), expected)
    found = saved(ours, prepared)
    look_up(ours, prepared, 2 * STEPS)

    again, plain = new()
    again.load_state_dict(found[0])
    again, resumed = make().prepare(again, plain)
    resumed.load_state_dict(found[1])
    look_up(again, resumed, 2 * STEPS)
    check_same(saved(again, resumed), saved(ours, prepared))
    back = kind(Words().parameters(), **settings)
    back.load_state_dict(found[1])
    check_same(saved(back)[0], found[1])


@pytest.mark.parametrize("row", TABLE_ROWS, ids=lambda row: row[0].__name__)
def test_the_state_of_a_table_before_its_first_update(row: Any, make: Make) -> None:
    words = Words()
    kind, settings = row
    fresh = saved(kind(words.parameters(), **settings))[0]
    _, prepared = make().prepare(words, kind(words.parameters(), **settings))
    check_same(saved(prepared)[0], fresh)


@pytest.mark.parametrize("row", [ROWS[1], ROWS[2], ROWS[3], ROWS[11]], ids=lambda row: row[0].__name__)
def test_partitioned_variables_have_one_state(row: Any, make: Make) -> None:
    net, optimizer = built(row)
    train(net, optimizer, 0)
    weights, state = saved(net, optimizer)
    train(net, optimizer, STEPS)
    expected = saved(net, optimizer)

    ours, plain = built(row)
    ours.load_state_dict(weights)
    ours, prepared = make(variable_partitioner=ps.placement.FixedShards(2)).prepare(ours, plain)
    prepared.load_state_dict(state)
    check_same(saved(prepared)[0], state)
    train(ours, prepared, STEPS)
    check_same(saved(ours, prepared), expected)


@pytest.mark.parametrize("row", [ROWS[1], ROWS[2], ROWS[3]], ids=lambda row: row[0].__name__)
def test_what_is_not_in_a_loaded_state_begins_anew(row: Any, make: Make) -> None:
    net, optimizer = built(row)
    fresh = saved(optimizer)[0]
    net, prepared = make().prepare(net, optimizer)
    train(net, prepared, 0)
    prepared.load_state_dict(fresh)
    check_same(saved(prepared)[0], fresh)
    weights = saved(net)[0]
    train(net, prepared, 0)

    plain, optimizer = built(row)
    plain.load_state_dict(weights)
    train(plain, optimizer, 0)
    check_same(saved(net, prepared), saved(plain, optimizer))


def test_settings_are_loaded_with_the_state_that_they_made(make: Make) -> None:
    """The state of momentum fits a rule only once it has momentum."""
    row = (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True})
    net, optimizer = built(row)
    train(net, optimizer, 0)
    weights, state = saved(net, optimizer)
    train(net, optimizer, STEPS)

    ours, plain = built((optim.SGD, {"lr": 1.0}))
    ours.load_state_dict(weights)
    ours, prepared = make().prepare(ours, plain)
    prepared.load_state_dict(state)
    train(ours, prepared, STEPS)
    check_same(saved(ours, prepared), saved(net, optimizer))


def test_each_of_several_optimizers_has_its_own_state(make: Make) -> None:
    net = Net()
    one, other = optim.Adam([net.large], lr=0.1, fused=True), optim.Adagrad([net.weight, net.seldom], lr=0.1)
    net, (one_, other_) = make().prepare(net, [one, other])
    for step in range(2):
        for parameter in (net.large, net.weight, net.seldom):
            parameter.grad = torch.full_like(parameter, step + 1.0)
        one_.step()
        other_.step()
    first, second = saved(one_, other_)
    assert first["state"].keys() == {0}
    assert second["state"].keys() == {0, 1}
    one_.load_state_dict({**first, "state": {}})
    check_same(saved(other_)[0], second)
    assert saved(one_)[0]["state"] == {}


def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(make: Make) -> None:
    net, optimizer = built((optim.RMSprop, {"lr": 0.1}))
    train(net, optimizer, 0)
    (other,) = saved(optimizer)
    net, prepared = make().prepare(*built((optim.Adam, {"lr": 0.2})))
    train(net, prepared, 0)
    (before,) = saved(prepared)
    with pytest.raises(ConfigError, match="state of 'large': Adam with its settings keeps step, exp_avg, exp_avg_sq"):
        prepared.load_state_dict(other)
    check_same(saved(prepared)[0], before)


def test_a_gathered_state_is_not_changed_by_later_steps(make: Make) -> None:
    net, prepared = make().prepare(*built(ROWS[3]))
    train(net, prepared, 0)
    state = prepared.state_dict()
    (before,) = saved(prepared)
    train(net, prepared, STEPS)
    check_same(state, before)


def test_hooks_of_all_optimizers_hear_nothing_of_it() -> None:
    _, prepared = ps.ParameterServerStrategy().prepare(*built(ROWS[3]))
    calls: list[object] = []
    handle = register_optimizer_step_post_hook(lambda *args: calls.append(args))
    prepared.load_state_dict(prepared.state_dict())
    handle.remove()
    assert not calls


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_the_chief_loads_for_all(lane: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    caplog.set_level("INFO", "paramserver")
    net, optimizer = built(ROWS[3])
    train(net, optimizer, 0)
    weights, state = saved(net, optimizer)
    train(net, optimizer, STEPS, 2)
    expected = saved(net, optimizer)
    with LocalCluster(ps=2, workers=2) as cluster:
        strategies = [ps.ParameterServerStrategy(cluster.resolver(task)) for task in ("chief:0", "worker:0")]
        made = []
        for strategy in strategies:
            ours, plain = built(ROWS[3])
            ours.load_state_dict(weights)
            plain.load_state_dict(state)
            made.append(strategy.prepare(ours, plain))
        (net_0, chief), (net_1, worker) = made
        train(net_0, chief, STEPS, 1)
        (now,) = saved(chief)
        worker.load_state_dict(state)
        assert "worker:0 leaves optimizer state to the chief" in caplog.text
        check_same(saved(worker)[0], now)
        train(net_1, worker, STEPS + 1, 1)
        check_same(saved(net_1, worker), expected)
        assert worker.last_push is not None
        assert worker.last_push.global_step == 2
        for strategy in strategies:
            strategy.close()


def test_several_replicas_have_one_state() -> None:
    row = ROWS[3]
    strategy = ps.CentralStorageStrategy(["cpu:0", "cpu:1"])
    net, prepared = strategy.prepare(*built(row))
    plain, optimizer = built(row)

    def one_step(step: int) -> None:
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0) if parameter.requires_grad else None
        prepared.step()

    for step in range(2):
        strategy.run(one_step, args=(step,))
        for parameter in plain.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0) if parameter.requires_grad else None
        optimizer.step()
    check_same(saved(net, prepared), saved(plain, optimizer))
    prepared.load_state_dict(saved(optimizer)[0])
    check_same(saved(prepared), saved(optimizer))


def test_a_chief_that_is_started_again_leaves_the_state_of_the_ps_tasks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "paramserver")
    with LocalCluster(ps=2, workers=1) as cluster:
        first = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
        net, prepared = first.prepare(*built(ROWS[3]))
        train(net, prepared, 0)
        (now,) = saved(prepared)
        assert first.client is not None
        first.client.close()  # as when its process dies
        net, optimizer = built(ROWS[3])
        train(net, optimizer, 0, 1)
        again = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
        _, prepared = again.prepare(net, optimizer)
        check_same(saved(prepared)[0], now)
        assert "prepare leaves the state of its optimizer" in caplog.text
        again.close()


def test_torchs_own_checkpoints_make_no_step_to_have_a_state(make: Make) -> None:
    """They do where an optimizer has no state and its parameters have no gradients, and need one to load into."""
    net, prepared = make().prepare(*built(ROWS[3]))
    train(net, prepared, 0)
    (before,) = saved(prepared)
    prepared.zero_grad()
    _, state = get_state_dict(net, prepared)
    assert {float(slots["step"]) for slots in state["state"].values()} == {2.0, 3.0}
    check_same(saved(prepared)[0], before)
    train(net, prepared, STEPS)
    set_optimizer_state_dict(net, prepared, state)
    check_same(saved(prepared)[0], before)
    net, prepared = make().prepare(*built(ROWS[3]))
    _, empty = get_state_dict(net, prepared)
    assert empty["state"].keys() == state["state"].keys()
    set_optimizer_state_dict(net, prepared, state)
    check_same(saved(prepared)[0], before)
