"""A worker with several replicas trains as plain PyTorch does with the whole batch.

Every program is written once, as a generator that yields the model after each step. It is played by plain PyTorch,
which runs its functions with the whole batch, and by strategies, which run them on replicas with a part of it each.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.patience import patience
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.distribute.bound.direct_gradients import LARGE
from paramserver.distribute.core.devices import Device
from paramserver.placement import FixedShards
from paramserver.testing.local_cluster import LocalCluster

Make = Callable[[nn.Module], Any]
Batch = tuple[Tensor, Tensor]

STEPS = 4


class Player:
    """Plays a program with plain PyTorch."""

    def prepare(self, model: nn.Module, make: Make, reduction: str = "mean") -> tuple[Any, Any]:
        return model, make(model)

    def run(self, fn: Callable[..., Any], *tensors: Tensor) -> Any:
        return fn(*tensors)


@dataclass
class Replicas(Player):
    """Plays a program on the replicas of a strategy."""

    strategy: ps.ParameterServerStrategy

    def prepare(self, model: nn.Module, make: Make, reduction: str = "mean") -> tuple[Any, Any]:
        return self.strategy.prepare(model, make(model), gradient_reduction=reduction)

    def run(self, fn: Callable[..., Any], *tensors: Tensor) -> Any:
        count = self.strategy.num_replicas_in_sync
        return self.strategy.run(fn, [ps.PerReplica(tensor.chunk(count)) for tensor in tensors])


@dataclass(frozen=True)
class Setting:
    """Where a program is played.

    Attributes:
        replicas: How many replicas the worker has.
        num_ps: How many ps tasks there are; 0 for one process.
        lane: What leads to them.
        away: Whether the replicas are elsewhere than the memory of the lanes, as on GPUs.
        options: For the strategy.
    """

    replicas: int
    num_ps: int = 0
    lane: str = "auto"
    away: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"{self.num_ps} ps {self.lane}" if self.num_ps else "in process"
        notes = [where, *self.options, *["away"] * self.away]
        return f"{self.replicas} replicas, {', '.join(notes)}"

    @contextlib.contextmanager
    def entered(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
        if self.away:
            put_away(monkeypatch)
        devices = [f"cpu:{index}" for index in range(self.replicas)]
        if not self.num_ps:
            yield Replicas(ps.CentralStorageStrategy(devices, **self.options))
            return
        monkeypatch.setenv("PARAMSERVER_LANE", self.lane)
        with LocalCluster(self.num_ps, workers=1) as cluster:
            strategy = ps.ParameterServerStrategy(
                cluster.resolver("chief:0"),
                compute_devices=devices,
                session_creation_timeout=patience(30),
                **self.options,
            )
            yield Replicas(strategy)
            strategy.close()


def put_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have replicas compute on a device that is not the memory's, though their tensors are on the CPU as well."""
    elsewhere = torch.device("cpu", 0)
    assert elsewhere != torch.empty(0, device=elsewhere).device  # else there is nothing to see here
    monkeypatch.setattr(Device, "torch_device", elsewhere)


SETTINGS = [
    Setting(2),
    Setting(4, away=True),
    Setting(2, num_ps=1),
    Setting(4, num_ps=2, lane="tcp"),
    Setting(1, num_ps=1, away=True),
    Setting(2, num_ps=2, away=True),
    Setting(2, num_ps=2, options={"variable_partitioner": FixedShards(2)}),
    Setting(2, num_ps=3, lane="tcp", away=True, options={"variable_partitioner": FixedShards(3)}),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SETTINGS, ids=str)
def player(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    with request.param.entered(monkeypatch) as player:
        yield player


@pytest.fixture(params=[SETTINGS[0], SETTINGS[1], SETTINGS[-2]], ids=str)
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    """For what has to do with replicas only, wherever the variables are."""
    with request.param.entered(monkeypatch) as player:
        yield player


Program = Callable[[Player], Iterator[nn.Module]]


def history(program: Program, player: Player) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [copy.deepcopy(model.state_dict()) for model in program(player)]


def assert_equal_to_plain(program: Program, player: Player, **tolerance: float) -> None:
    expected, actual = history(program, Player()), history(program, player)
    assert len(actual) == len(expected) > 1
    for before, after in zip(expected, actual, strict=True):
        torch.testing.assert_close(after, before, **tolerance)
    assert any(not torch.equal(value, expected[0][name]) for name, value in expected[-1].items()), "nothing was trained"


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def batches(count: int = STEPS, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 6, generator=generator).to(dtype), torch.randint(0, 3, (8,), generator=generator)


def backward(model: nn.Module, features: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    loss = F.cross_entropy(model(features).float(), labels, reduction=reduction)
    loss.backward()
    return loss


def ordinary(player: Player, model: Any, optimizer: Any, reduction: str = "mean") -> Iterator[nn.Module]:
    """The loop that everybody writes."""

    def step(features: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        backward(model, features.to(next(model.parameters()).dtype), labels, reduction)
        optimizer.step()

    for batch in batches():
        player.run(step, *batch)
        yield model


def sgd(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model: nn.Module) -> optim.Optimizer:
    return optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1)


# --- gradients become one


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_part_of_the_batch_on_each_replica(make: Make, reduction: str, player: Replicas) -> None:
    """W03: the gradients of a worker's replicas are one update."""

    def program(player: Player) -> Iterator[nn.Module]:
        yield from ordinary(player, *player.prepare(net(), make, reduction), reduction)

    assert_equal_to_plain(program, player)


class Branches(nn.Module):
    """Layers that only some of the samples pass, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 3, bias=index % 2 == 0) for index in range(6))

    def loss(self, features: Tensor, labels: Tensor, which: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(layer(features[which == index]), labels[which == index], reduction="sum")
            for index, layer in enumerate(self.layers)
            if (which == index).any()
        ]
        return torch.stack(losses).sum() / len(features)


@pytest.mark.parametrize("make", [sgd, adam])
def test_a_parameter_without_a_gradient_on_some_or_all_replicas(make: Make, player: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model, optimizer = player.prepare(Branches(), make)

        def step(features: Tensor, labels: Tensor, which: Tensor) -> None:
            optimizer.zero_grad()
            model.loss(features, labels, which).backward()
            optimizer.step()

        for index, batch in enumerate(batches(6)):
            player.run(step, *batch, torch.arange(8) // 2 + index % 2)  # layer 5 never
            yield model

    assert_equal_to_plain(program, player)


def test_gradients_that_are_accumulated_over_several_runs(player: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model, optimizer = player.prepare(net(), sgd)
        for batch in batches():
            for _ in range(3):
                player.run(lambda *part: backward(model, *part), *batch)
            player.run(optimizer.step)
            optimizer.zero_grad()
            yield model

    assert_equal_to_plain(program, player)


def test_gradients_that_are_kept_over_steps(player: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model, optimizer = player.prepare(net(), sgd)

        def step(features: Tensor, labels: Tensor) -> None:
            backward(model, features, labels)
            optimizer.step()

        for batch in batches():
            player.run(step, *batch)
            yield model

    assert_equal_to_plain(program, player)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("forget", ["set_to_none", "zero", "model", "original"])
def test_every_way_to_forget_gradients(forget: str, where: str, few: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model = net()
        original = sgd(model)
        model, optimizer = player.prepare(model, lambda _: original)

        def zero_grad() -> None:
            match forget:
                case "set_to_none":
                    optimizer.zero_grad()
                case "zero":
                    optimizer.zero_grad(set_to_none=False)
                case "model":
                    model.zero_grad()
                case "original":
                    original.zero_grad()

        def step(features: Tensor, labels: Tensor) -> None:
            if where == "inside":
                zero_grad()
            backward(model, features, labels)
            optimizer.step()

        for batch in batches():
            if where == "outside":
                zero_grad()
            player.run(step, *batch)
            yield model

    assert_equal_to_plain(program, few)


def test_gradients_that_are_changed_through_the_param_groups(few: Replicas) -> None:
    """A replica finds its own parameters in the optimizer, as in the model."""

    def program(player: Player) -> Iterator[nn.Module]:
        model, optimizer = player.prepare(net(), sgd)

        def step(features: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            backward(model, features, labels)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = parameter.grad * 2
            nn.utils.clip_grad_value_(model[2].bias, 0.0)
            model[0].bias.grad = None
            optimizer.step()

        for batch in batches():
            player.run(step, *batch)
            yield model

    assert_equal_to_plain(program, few)


def test_a_closure_computes_the_gradients(few: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model, optimizer = player.prepare(net(), sgd)

        def step(features: Tensor, labels: Tensor) -> Tensor:
            def closure() -> Tensor:
                optimizer.zero_grad()
                return backward(model, features, labels)

            return optimizer.step(closure)

        for batch in batches():
            assert player.run(step, *batch) is not None
            yield model

    assert_equal_to_plain(program, few)


def test_several_optimizers(player: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model, (one, other) = player.prepare(net(), lambda model: (sgd(model[0]), adam(model[2])))

        def step(features: Tensor, labels: Tensor) -> None:
            for optimizer in (one, other):
                optimizer.zero_grad()
                backward(model, features, labels)
                optimizer.step()

        for batch in batches():
            player.run(step, *batch)
            yield model

    assert_equal_to_plain(program, player)


# --- schedules, hooks, freezing


def test_a_schedule_is_stepped_outside_of_replicas(player: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model, optimizer = player.prepare(net(), adam)
        schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for model in ordinary(player, model, optimizer):  # noqa: B020  # the same object
            schedule.step()
            yield model
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**STEPS)

    assert_equal_to_plain(program, player)


def test_hooks_of_modules_and_parameters_and_steps(few: Replicas) -> None:
    """A hook of a parameter holds on every replica, whether it was there before prepare or not."""

    def program(player: Player) -> Iterator[nn.Module]:
        model: Any = net()
        model[0].register_forward_hook(lambda module, args, output: output * 2)
        model[0].weight.register_hook(lambda gradient: gradient * 3)
        model, optimizer = player.prepare(model, sgd)
        model[2].weight.register_hook(lambda gradient: gradient + 1)

        def forget_bias(*_: Any) -> None:
            model[2].bias.grad = None

        optimizer.register_step_pre_hook(forget_bias)
        yield from ordinary(player, model, optimizer)

    assert_equal_to_plain(program, few)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_frozen_parameters_that_are_trained_later(where: str, few: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model: Any = net().requires_grad_(False)
        model[2].requires_grad_(True)
        model, optimizer = player.prepare(model, adam)
        yield from ordinary(player, model, optimizer)

        def change() -> None:
            model[0].requires_grad_(True)
            model[2].bias.requires_grad_(False)

        player.run(change) if where == "inside" else change()
        yield from ordinary(player, model, optimizer)

    assert_equal_to_plain(program, few)


# --- what a model is made of


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.second(self.first(features).tanh())


class Words(nn.Module):
    """An embedding and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6, padding_idx=0)
        self.recurrent = nn.LSTM(6, 5, batch_first=True)
        self.output = nn.Linear(5, 3)

    def forward(self, features: Tensor) -> Tensor:
        _, (state, _) = self.recurrent(self.embedding(features.abs().mul(3).long().clamp(max=9)))
        return self.output(state[0])


class Peculiar(nn.Module):
    """A scalar, an empty parameter, and buffers that change in the same way whatever the batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.weight = nn.Parameter(torch.randn(6, 3))
        self.constant = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("mask", torch.full((3,), -torch.inf).masked_fill(torch.tensor([True, True, False]), 0.0))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("trace", torch.ones(3))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("grown", torch.zeros(1), persistent=False)
        self.register_buffer("late", None)

    def forward(self, features: Tensor) -> Tensor:
        self.count += 1
        self.trace = self.trace * 0.9 + self.grown.sum()
        self.flag = ~self.flag
        self.grown = torch.cat([self.grown, torch.ones(1)])
        self.late = torch.ones(1) if self.late is None else self.late + 1
        assert len(self.grown) == self.count + 1 == self.late + 1
        output = features @ self.weight * self.scale + self.empty.sum() + self.constant
        return output + self.mask.exp() + self.flag


@pytest.mark.parametrize("make", [Tied, Words, Peculiar, lambda: nn.Linear(6, 3, bias=False)])
def test_models_of_every_kind(make: Callable[[], nn.Module], player: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        yield from ordinary(player, *player.prepare(make(), adam))

    assert_equal_to_plain(program, player)


def test_a_large_layer_whose_gradient_is_computed_in_its_place(few: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        model = nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, LARGE // 512 // 4, bias=False))
        yield from ordinary(player, *player.prepare(model, sgd))

    assert_equal_to_plain(program, few)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(dtype: torch.dtype, tolerance: float, player: Replicas) -> None:
    def program(player: Player) -> Iterator[nn.Module]:
        yield from ordinary(player, *player.prepare(net().to(dtype), sgd))

    assert_equal_to_plain(program, player, rtol=tolerance, atol=tolerance)


# --- rules of replicas


@pytest.fixture
def two() -> Replicas:
    """Two replicas in one process."""
    return Replicas(ps.CentralStorageStrategy(["cpu:0", "cpu:1"]))


def test_a_step_counts_once_for_all_replicas(player: Replicas) -> None:
    """W05, U09: the global step counts the steps of workers, not of replicas."""
    model, optimizer = player.prepare(net(), sgd)
    for _ in ordinary(player, model, optimizer):
        pass
    assert player.strategy.global_step == optimizer.last_push.global_step == STEPS
    assert {status.updates for status in player.strategy.connect().status()} == {STEPS}


@pytest.mark.parametrize("lr", [0.05, 0.2])
def test_every_step_comes_closer(lr: float, player: Replicas) -> None:
    """U12."""
    model, optimizer = player.prepare(nn.Linear(1, 1, bias=False), lambda model: optim.SGD(model.parameters(), lr=lr))

    def step(features: Tensor) -> None:
        optimizer.zero_grad()
        (model(features) - 1).square().mean().backward()
        optimizer.step()

    distances = []
    for _ in range(10):
        player.run(step, torch.ones(4, 1))
        distances.append(abs(model.weight.item() - 1))
    assert distances == sorted(distances, reverse=True)
    assert len(set(distances)) == 10


@pytest.mark.parametrize("where", ["outside", "in a merge"])
def test_a_step_belongs_into_the_replicas(where: str, two: Replicas) -> None:
    """U10: with several replicas, each has gradients of its own."""
    _, optimizer = two.prepare(net(), sgd)

    def merge() -> None:
        ps.get_replica_context().merge_call(lambda _: optimizer.step())

    with pytest.raises(RuntimeError, match=r"this worker has 2 replicas.*call it inside the function that .*run"):
        optimizer.step() if where == "outside" else two.strategy.run(merge)


def test_one_replica_may_step_anywhere() -> None:
    """R07: PyTorch is eager."""
    alone = Replicas(ps.CentralStorageStrategy(["cpu:0"]))
    _, optimizer = alone.prepare(net(), sgd)
    optimizer.step()
    alone.run(optimizer.step)
    assert alone.strategy.global_step == 2


def assert_trains_on(player: Replicas, model: Any, optimizer: Any) -> None:
    """The modules hold the first replica's tensors, and training goes on as if nothing had happened."""
    assert [id(parameter) for parameter in model.parameters()] == [
        id(parameter) for group in optimizer.param_groups for parameter in group["params"]
    ]
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.grad = None
    plain_optimizer = optim.SGD(plain.parameters(), lr=0.1)
    for expected, actual in zip(
        ordinary(Player(), plain, plain_optimizer), ordinary(player, model, optimizer), strict=True
    ):
        torch.testing.assert_close(actual.state_dict(), expected.state_dict())


def plain_sgd(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1)


def test_different_numbers_of_steps_are_an_error(few: Replicas) -> None:
    """E08: nothing hangs, no thread is left, and the strategy can be used."""
    count = few.strategy.num_replicas_in_sync
    model, optimizer = few.prepare(net(), plain_sgd)
    first = [id(parameter) for parameter in model.parameters()]

    def steps(number: int) -> None:
        for _ in range(number):
            optimizer.step()

    with pytest.raises(RuntimeError, match="different number of replica_context\\(\\).merge_call\\(\\) calls"):
        few.strategy.run(steps, [ps.PerReplica([2, *[1] * (count - 1)])])
    assert [id(parameter) for parameter in model.parameters()] == first
    assert_trains_on(few, model, optimizer)


def test_an_exception_of_one_replica_leaves_the_model_usable(few: Replicas) -> None:
    """E09."""
    count = few.strategy.num_replicas_in_sync
    model, optimizer = few.prepare(net(), plain_sgd)
    first = [id(parameter) for parameter in model.parameters()]
    unwound = []

    def fail(features: Tensor, labels: Tensor) -> None:
        try:
            backward(model, features, labels)
            if ps.get_replica_context().replica_id_in_sync_group == count - 1:
                raise KeyError("the last one")
            optimizer.step()
        finally:
            unwound.append(threading.current_thread())

    with pytest.raises(KeyError, match="the last one"):
        few.run(fail, *next(batches()))
    assert len(set(unwound)) == count
    assert [id(parameter) for parameter in model.parameters()] == first
    assert_trains_on(few, model, optimizer)


class Buffers(nn.Module):
    """Buffers of every kind, moved by what a replica is told."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.tensor([10.0, -torch.inf, -torch.inf]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("is_odd", torch.tensor(False))

    def forward(self, move: Tensor) -> None:
        self.average = torch.where(move.isnan(), self.average, self.average.nan_to_num(0, 0, 0) + move)
        self.count += int(move[0])
        self.is_odd.copy_(self.count % 2 == 1)


@pytest.mark.parametrize("setting", [Setting(2), Setting(2, away=True), Setting(2, num_ps=2)], ids=str)
def test_a_buffer_becomes_the_mean_of_the_replicas(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """An integer one becomes the first replica's, a boolean one that of the first replica that has changed it."""
    with setting.entered(monkeypatch) as player:
        model: Any
        model, optimizer = player.prepare(nn.Sequential(Buffers(), nn.Linear(1, 1)), plain_sgd)

        def step(move: Tensor) -> Tensor:
            model[0](move[0])
            optimizer.step()
            return torch.cat([model[0].average, model[0].count[None], model[0].is_odd[None]])

        def after(moves: list[list[float]]) -> list[list[float]]:
            return [held.tolist() for held in player.strategy.local_results(player.run(step, torch.tensor(moves)))]

        nan, inf = torch.nan, torch.inf  # no number is no move
        assert after([[1, nan, 7], [2, nan, 9]]) == [[11.5, -inf, 8, 1, True], [11.5, -inf, 8, 1, True]]
        assert after([[1, nan, nan], [1, nan, 2]]) == [[12.5, -inf, 9, 2, False], [12.5, -inf, 9, 2, False]]
        assert after([[1, nan, nan], [1, 5, nan]]) == [[13.5, -inf, 9, 3, True], [13.5, -inf, 9, 3, True]]
        assert model[0].average.tolist() == [13.5, -inf, 9]


def test_a_buffer_that_becomes_another_is_refused(few: Replicas) -> None:
    model, optimizer = few.prepare(nn.Sequential(Buffers(), nn.Linear(6, 3)), plain_sgd)

    def step() -> None:
        model[0].count = model[0].count * 0.5
        optimizer.step()

    with pytest.raises(ps.errors.ConfigError, match=r"'0.count' is int64\[\] on its ps, and the model has float32\[\]"):
        few.run(step)


def test_values_that_are_put_in_a_parameters_place_reach_every_replica(player: Replicas) -> None:
    """A2: the next step is refused, until the chief assigns them, or they are dropped."""
    model: Any
    model, optimizer = player.prepare(net(), sgd)
    before = model[0].weight.detach().clone()
    for assigns in (True, False):
        model[0].weight.data = torch.zeros_like(before)
        if assigns:
            player.strategy.assign(model)
        else:
            model[0].weight.data += 1
            with pytest.raises(ps.errors.EditedError, match=r"parameter '0\.weight'"):
                player.run(optimizer.step)
            player.strategy.refresh()
        player.run(optimizer.step)  # pushes nothing and pulls
        found = player.run(lambda: model[0].weight.detach().clone())
        for values in player.strategy.local_results(found):
            assert torch.equal(values, torch.zeros_like(before))


def test_a_replica_computes_with_its_own_tensors_also_without_gradients(few: Replicas) -> None:
    """Evaluation on replicas gives what it gives outside of them."""
    model, optimizer = few.prepare(net(), sgd)
    list(ordinary(few, model, optimizer))
    features, _ = next(batches())
    with torch.no_grad():
        found = few.run(model, features)
        outputs = torch.cat(few.strategy.local_results(found))
        assert not outputs.requires_grad
        torch.testing.assert_close(outputs, model(features))


# --- several workers


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("num_ps", [2, 3])
def test_parts_of_a_variable_that_one_worker_changes_arrive_at_the_other(num_ps: int, make: Make) -> None:
    """P07: each part is a variable of its own, on a ps of its own."""
    with LocalCluster(num_ps, workers=2) as cluster:
        strategies = [
            ps.ParameterServerStrategy(
                cluster.resolver(task),
                compute_devices=["cpu:0", "cpu:1"],
                variable_partitioner=FixedShards(num_ps),
                session_creation_timeout=patience(30),
            )
            for task in cluster.tasks
        ]
        torch.manual_seed(0)
        table = nn.Embedding(10, 3)
        plain = copy.deepcopy(table)
        plain_optimizer = make(plain)
        workers = []
        for strategy in strategies:
            worker = Replicas(strategy)
            workers.append((worker, *worker.prepare(table if not workers else nn.Embedding(10, 3), make)))

        def step(model: Any, optimizer: Any, rows: Tensor) -> None:
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            optimizer.step()

        for turn in range(6):
            player, model, optimizer = workers[turn % 2]
            optimizer.zero_grad()
            player.run(optimizer.step)  # pushes nothing and pulls
            rows = (torch.arange(8) * (turn + 1)) % 10
            player.run(lambda part, model=model, optimizer=optimizer: step(model, optimizer, part), rows)
            step(plain, plain_optimizer, rows)
            torch.testing.assert_close(model.state_dict(), plain.state_dict())
        assert [server.status().num_variables for server in cluster.servers] == [1] * num_ps
        for strategy in strategies:
            strategy.close()
