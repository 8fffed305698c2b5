"""Training with parameter servers equals plain PyTorch from the same seed, step by step.

Every test is a program written once, as a generator that yields the model after each step; it is run with plain
PyTorch and with `Strategy.prepare`, in one process and with real ps tasks over every lane.
"""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # as everybody calls it
from tests.patience import patience
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

import paramserver as ps
from paramserver.distribute.bound import parameters as bound_parameters
from paramserver.layout.blocks import BLOCK

Prepare = Callable[[nn.Module, optim.Optimizer], tuple[Any, Any]]
Program = Callable[[Prepare], Iterator[nn.Module]]

STEPS = 4
# To test a new rule with real ps tasks, add a row; tests/unit/layout/test_rules.py tests it with all its settings.
RULES: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}),
    (optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (optim.AdamW, {"lr": 0.01}),
    (optim.Adamax, {"lr": 0.01}),
    (optim.NAdam, {"lr": 0.01}),
    (optim.RAdam, {"lr": 0.01}),
    (optim.RMSprop, {"lr": 0.01, "centered": True}),
    (optim.Rprop, {"lr": 0.01}),
    (optim.ASGD, {"lr": 0.01}),
    (optim.Adadelta, {"lr": 0.5}),
]


class Run:
    """The ps tasks of a run, on threads of this process, and the strategies of its workers."""

    def __init__(self, num_ps: int, num_workers: int = 1) -> None:
        workers = [f"127.0.0.1:{index + 1}" for index in range(num_workers)]  # nobody listens there
        unbound = {"worker": workers, "ps": ["127.0.0.1:0"] * num_ps}
        self.servers = [ps.Server(unbound, "ps", index) for index in range(num_ps)]
        self.cluster = ps.ClusterSpec({"worker": workers, "ps": [server.target for server in self.servers]})
        self.strategies: list[ps.ParameterServerStrategy] = []

    def strategy(self, worker: int = 0) -> ps.ParameterServerStrategy:
        resolver = ps.SimpleClusterResolver(self.cluster, task_type="worker", task_id=worker)
        self.strategies.append(ps.ParameterServerStrategy(resolver, session_creation_timeout=patience(30)))
        return self.strategies[-1]

    def close(self) -> None:
        for strategy in self.strategies:
            strategy.close()
        for server in self.servers:
            server.stop()


@contextlib.contextmanager
def a_run(num_ps: int, num_workers: int = 1) -> Iterator[Run]:
    run = Run(num_ps, num_workers)
    try:
        yield run
    finally:
        run.close()


@pytest.fixture(autouse=True)
def _some_gradients_are_brought_home_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_parameters, "LATE_BYTES", 100)  # of most models here, biases and no weights


@pytest.fixture(params=["in process", "1 ps auto", "2 ps auto", "1 ps tcp", "2 ps tcp"])
def strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ps.ParameterServerStrategy]:
    """A strategy in one process, and of the only worker of a cluster."""
    if request.param == "in process":
        yield ps.ParameterServerStrategy()
        return
    num_ps, _, lane = request.param.split()
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with a_run(int(num_ps)) as run:
        yield run.strategy()


@pytest.fixture
def prepare(strategy: ps.ParameterServerStrategy) -> Prepare:
    """Its `prepare`."""
    return strategy.prepare


def plainly(model: nn.Module, optimizer: optim.Optimizer) -> tuple[nn.Module, optim.Optimizer]:
    return model, optimizer


def history(program: Program, prepare: Prepare) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [copy.deepcopy(model.state_dict()) for model in program(prepare)]


def assert_equal_to_plain(program: Program, prepare: Prepare, **tolerance: float) -> None:
    expected, actual = history(program, plainly), history(program, prepare)
    assert len(actual) == len(expected) > 1
    for before, after in zip(expected, actual, strict=True):
        torch.testing.assert_close(after, before, **tolerance)
    assert any(not torch.equal(value, expected[0][name]) for name, value in expected[-1].items()), "nothing was trained"


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def batches(count: int = STEPS, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        features = torch.randn(8, 6, generator=generator).to(dtype)
        yield features, torch.randint(0, 3, (8,), generator=generator)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = F.cross_entropy(model(batch[0]).float(), batch[1])
    loss.backward()
    return loss


def ordinary(model: Any, optimizer: Any, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
    """The loop that everybody writes."""
    for batch in batches(dtype=dtype):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        yield model


# --- rules and param groups


@pytest.mark.parametrize(("rule", "settings"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_rule(rule: type[optim.Optimizer], settings: dict[str, Any], prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        yield from ordinary(*prepare(model, rule(model.parameters(), **settings)))

    assert_equal_to_plain(program, prepare)


def test_param_groups_with_settings_of_their_own(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        groups = [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [model[2].weight], "weight_decay": 0.1},
            {"params": [model[2].bias], "momentum": 0.0},
        ]
        yield from ordinary(*prepare(model, optim.SGD(groups, lr=0.02, momentum=0.9)))

    assert_equal_to_plain(program, prepare)


@pytest.mark.parametrize("given", ["the original", "the prepared"])
def test_a_schedule_works_whichever_optimizer_it_was_given(given: str, prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        original = optim.AdamW(model.parameters(), lr=0.1)
        early = optim.lr_scheduler.StepLR(original, 2, gamma=0.1) if given == "the original" else None
        model, optimizer = prepare(model, original)
        schedule = early or optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
        for model in ordinary(model, optimizer):  # noqa: B020  # the same object
            schedule.step()
            yield model
        assert math.isclose(optimizer.param_groups[0]["lr"], 0.001)

    assert_equal_to_plain(program, prepare)


def test_a_schedule_of_momentum_and_of_a_parameter_group(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=STEPS)
        for model in ordinary(model, optimizer):  # noqa: B020
            yield model
            schedule.step()

    assert_equal_to_plain(program, prepare)


def test_settings_that_are_loaded_are_pushed(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
        schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lr"] = 0.01
        optimizer.load_state_dict(saved)
        for model in ordinary(model, optimizer):  # noqa: B020
            schedule.step()
            yield model
        assert math.isclose(optimizer.param_groups[0]["lr"], 0.01 * 0.5**STEPS)

    assert_equal_to_plain(program, prepare)


# --- parameters that are trained at times only


def test_frozen_parameters_that_are_trained_later(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net().requires_grad_(False)
        model[2].requires_grad_(True)
        model, optimizer = prepare(model, optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1))
        yield from ordinary(model, optimizer)
        model[0].requires_grad_(True)
        model[2].bias.requires_grad_(False)
        yield from ordinary(model, optimizer)

    assert_equal_to_plain(program, prepare)


def test_parameters_that_no_optimizer_holds_stay(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        yield from ordinary(*prepare(model, optim.SGD(model[2].parameters(), lr=0.1)))

    assert_equal_to_plain(program, prepare)


def test_parameters_without_a_gradient_in_some_steps(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = nn.ModuleList(nn.Linear(6, 3, bias=index % 2 == 0) for index in range(5))
        model, optimizer = prepare(model, optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1))
        for step, batch in enumerate(batches(6)):
            optimizer.zero_grad()
            for index in {step % 5, 3 * step % 5}:
                backward(model[index], batch)
            optimizer.step()
            yield model
        optimizer.zero_grad()
        optimizer.step()
        yield model

    assert_equal_to_plain(program, prepare)


# --- what a program does to gradients


@pytest.mark.parametrize("forget", ["set_to_none", "zero", "model", "original"])
def test_every_way_to_forget_gradients(forget: str, prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        original = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = prepare(model, original)
        for batch in batches():
            match forget:
                case "set_to_none":
                    optimizer.zero_grad()
                case "zero":
                    optimizer.zero_grad(set_to_none=False)
                case "model":
                    model.zero_grad()
                case "original":
                    original.zero_grad()
            backward(model, batch)
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


def test_gradients_that_are_accumulated_clipped_and_replaced(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.Adagrad(model.parameters(), lr=0.1))
        for batch in batches():
            optimizer.zero_grad()
            for _ in range(3):
                backward(model, batch)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            model[0].bias.grad = torch.ones(7)
            model[2].weight.grad = model[2].weight.grad * 2
            model[2].bias.grad = None
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


def test_gradients_that_are_kept_over_steps_and_from_before_prepare(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        original = optim.SGD(model.parameters(), lr=0.1)
        backward(model, next(batches()))
        model, optimizer = prepare(model, original)
        for batch in batches():
            backward(model, batch)
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_have_a_graph(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
        for features, labels in batches():
            optimizer.zero_grad()
            for _ in range(2):
                F.cross_entropy(model(features), labels).backward(create_graph=True)
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


def test_a_gradient_penalty(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.Adam(model.parameters(), lr=0.1))
        for features, labels in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(features.requires_grad_(True)), labels)
            (slope,) = torch.autograd.grad(loss, features, create_graph=True)
            (loss + slope.square().sum()).backward()
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


def test_a_closure_computes_the_gradients_and_its_loss_comes_back(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
        for batch in batches():

            def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                optimizer.zero_grad()
                return backward(model, batch)

            with torch.no_grad():  # closures compute gradients all the same
                loss = optimizer.step(closure)
            assert loss.item() > 0
            yield model

    assert_equal_to_plain(program, prepare)


def test_a_gradient_scaler_skips_what_overflowed(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step, (features, labels) in enumerate(batches()):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(features), labels) * (math.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            yield model

    assert_equal_to_plain(program, prepare)


@pytest.mark.parametrize("given", ["the original", "the prepared"])
def test_step_hooks_are_called_around_the_step(given: str, prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        calls: list[str] = []
        original = optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = prepare(model, original)
        register_on = original if given == "the original" else optimizer
        register_on.register_step_pre_hook(lambda *_: calls.append("before"))
        register_on.register_step_post_hook(lambda *_: calls.append("after"))

        def closure() -> Tensor:
            calls.append("closure")
            return backward(model, next(batches()))

        for _ in range(2):
            optimizer.step(closure)
            yield model
        assert calls == ["before", "closure", "after"] * 2

    assert_equal_to_plain(program, prepare)


def test_a_graph_that_is_older_than_the_values_is_refused(prepare: Prepare) -> None:
    model = net()
    model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
    loss = F.cross_entropy(model(next(batches())[0]), next(batches())[1])
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


class Peculiar(nn.Module):
    """A scalar, an empty parameter, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.weight = nn.Parameter(torch.randn(6, 3))
        self.constant = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("mask", torch.full((3,), -math.inf).masked_fill(torch.tensor([True, True, False]), 0.0))
        self.register_buffer("largest", torch.tensor(-math.inf))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("small", torch.tensor([250, 3], dtype=torch.uint8))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, features: Tensor) -> Tensor:
        self.count += 1
        self.small += 2
        self.cache += 1
        self.seen[self.count % 3] = True
        output = features @ self.weight * self.scale + self.empty.sum() + self.constant
        self.largest.copy_(torch.maximum(self.largest, output.detach().max()))
        return output + self.mask.exp()


class Rebinding(nn.Module):
    """Puts new tensors into its buffers' places."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("trace", torch.ones(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flag", torch.tensor(False))

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.linear(features)
        self.trace = self.trace * 0.9 + output.detach().mean(0)
        self.count = self.count + 1
        self.flag = ~self.flag
        return output + self.trace


class Words(nn.Module):
    """An embedding and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6, padding_idx=0)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.output = nn.Linear(5, 3)

    def forward(self, features: Tensor) -> Tensor:
        _, state = self.recurrent(self.embedding(features.abs().mul(3).long().clamp(max=9)))
        return self.output(state[0])


@pytest.mark.parametrize(
    "make",
    [
        Tied,
        Peculiar,
        Rebinding,
        Words,
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.PReLU(), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 3)),
        lambda: nn.Linear(6, 3, bias=False),  # less than one variable for each ps
    ],
    ids=["tied", "peculiar", "rebinding", "words", "batch norm", "weight norm", "spectral norm", "one variable"],
)
def test_models_of_every_kind(make: Callable[[], nn.Module], prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = make()
        yield from ordinary(*prepare(model, optim.Adam(model.parameters(), lr=0.05)))
        model.eval()
        yield model

    assert_equal_to_plain(program, prepare)


def test_buffers_that_are_not_saved_stay_with_the_worker(prepare: Prepare) -> None:
    model = Peculiar()
    model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
    list(ordinary(model, optimizer))
    assert model.cache.tolist() == [STEPS, STEPS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        # Whole vector registers: where one ends early, torch itself rounds half precision otherwise.
        model = nn.Sequential(nn.Linear(6, 64), nn.LayerNorm(64), nn.Linear(64, 32)).to(dtype)
        yield from ordinary(*prepare(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9)), dtype)

    assert_equal_to_plain(program, prepare)


def test_a_model_of_several_dtypes(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = nn.ModuleList([nn.Linear(6, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)])
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
        for features, labels in batches():
            optimizer.zero_grad()
            for part in model:
                F.cross_entropy(part(features.to(part.weight.dtype)).float(), labels).backward()
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


def test_autocast(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
        for features, labels in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(features), labels)
            loss.backward()
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


def test_an_arena_of_several_blocks_and_many_gaps(prepare: Prepare) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = nn.ModuleList([nn.Linear(6, 3), nn.Embedding(BLOCK // 4 + 5, 5), nn.Linear(6, 3)])
        model.extend(nn.PReLU() for _ in range(50))
        model, optimizer = prepare(model, optim.Adagrad(model.parameters(), lr=0.1))
        for step, batch in enumerate(batches(3)):
            optimizer.zero_grad()
            if step != 1:
                model[1].weight[:: BLOCK // 16].square().sum().backward()
            sum(prelu(torch.tensor(-1.0)) for prelu in model[3::2]).sum().backward()
            backward(model[step], batch) if step != 1 else None
            optimizer.step()
            yield model

    assert_equal_to_plain(program, prepare)


def test_values_that_a_program_assigns_are_trained(strategy: ps.ParameterServerStrategy) -> None:
    def program(prepare: Prepare) -> Iterator[nn.Module]:
        model = net()
        model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
        for model in ordinary(model, optimizer):  # noqa: B020
            yield model
            model[0].weight.data = model[0].weight.data.clamp(-0.1, 0.1)
            with torch.no_grad():
                model[2].weight.clamp_(-0.1, 0.1)
            if prepare == strategy.prepare:
                assert strategy.assign(model) == strategy.global_step

    assert_equal_to_plain(program, strategy.prepare)


@pytest.mark.parametrize("late_bytes", [0, 100])
@pytest.mark.parametrize("convert", [lambda model: model.double(), lambda model: model.bfloat16()])
def test_a_model_that_is_converted_after_prepare_is_refused(
    convert: Callable[[nn.Module], nn.Module],
    late_bytes: int,
    prepare: Prepare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bound_parameters, "LATE_BYTES", late_bytes)
    model = nn.Linear(6, 3, bias=False)  # one parameter: after an error, torch holds what is left of a graph
    model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
    convert(model)
    loss = model(next(batches(dtype=model.weight.dtype))[0]).sum()

    def step() -> None:
        loss.backward()
        optimizer.step()  # whose part it is where gradients come home late

    with pytest.raises(ps.errors.ConfigError, match=r"'weight' is float32\[3, 6\] on its ps.*convert the model before"):
        step()


def test_a_buffer_that_becomes_another_is_refused(prepare: Prepare) -> None:
    model = Rebinding()
    model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
    backward(model, next(batches()))
    model.count = model.count * 0.5
    with pytest.raises(ps.errors.ConfigError, match=r"'count' is int64\[\] on its ps, and the model has float32\[\]"):
        optimizer.step()


def test_a_sparse_gradient_of_a_parameter_that_is_no_table_is_refused(prepare: Prepare) -> None:
    model = nn.Embedding(5, 3)
    model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
    model.weight.grad = torch.ones(5, 3).to_sparse()
    with pytest.raises(NotImplementedError, match="'weight' got a sparse gradient"):
        optimizer.step()


# --- memory


def test_a_worker_holds_values_and_gradients_and_no_third_copy(prepare: Prepare) -> None:
    array = np.ones((64, 6), dtype=np.float32)
    before = weakref.ref(array)
    model = nn.Linear(6, 64)
    model.weight.data = torch.from_numpy(array)
    del array
    original = optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = prepare(model, original)
    assert before() is None, "the values from before prepare are still held"
    list(ordinary(model, optimizer))
    assert np.shares_memory(model.weight.grad.numpy(), next(iter(model.parameters())).grad.numpy())


def test_a_gradient_is_in_its_place_before_the_next_one_is_computed(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound_parameters, "LATE_BYTES", 0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
    backward(model, next(batches()))
    places = {id(parameter): parameter.grad.data_ptr() for parameter in model.parameters()}
    optimizer.zero_grad()
    landed: list[bool] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: landed.append(parameter.grad.data_ptr() == places[id(parameter)])
        )
    backward(model, next(batches()))
    assert landed == [True] * 8


def test_a_copy_of_a_prepared_model_is_a_model_of_its_own(prepare: Prepare) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    model, optimizer = prepare(model, optim.SGD(model.parameters(), lr=0.1))
    average = copy.deepcopy(model)
    before = copy.deepcopy(average.state_dict())
    list(ordinary(model, optimizer))
    assert not torch.equal(model[0].weight, average[0].weight)
    torch.testing.assert_close(average.state_dict(), before)


# --- random streams


def orders(prepare: Prepare) -> list[list[int]]:
    torch.manual_seed(0)
    model = net()
    prepare(model, optim.SGD(model.parameters(), lr=0.1))
    loader = DataLoader(TensorDataset(torch.arange(50)), batch_size=50, shuffle=True)
    return [batch[0].tolist() for _ in range(2) for batch in loader]


def test_the_first_worker_shuffles_as_plain_pytorch_does(prepare: Prepare) -> None:
    assert orders(prepare) == orders(plainly)


def test_workers_shuffle_differently() -> None:
    with a_run(num_ps=1, num_workers=3) as run:
        found = [orders(run.strategy(worker).prepare) for worker in range(3)]
    assert found[0] == orders(plainly)
    assert len({tuple(order) for each in found for order in each}) == 6


# --- several workers


@pytest.mark.parametrize("lane", ["auto", "tcp"])
@pytest.mark.parametrize("num_ps", [1, 2])
def test_the_values_of_all_workers_agree_after_a_pull(num_ps: int, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """W02: variables live once. The chief's initial values are everyone's."""
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with a_run(num_ps, num_workers=2) as run:
        workers = []
        for index in range(2):
            model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
            workers.append(run.strategy(index).prepare(model, optim.Adam(model.parameters(), lr=0.01)))
        torch.testing.assert_close(workers[1][0].state_dict(), workers[0][0].state_dict(), rtol=0, atol=0)
        for batch in batches():
            for model, optimizer in workers:
                optimizer.zero_grad()
                backward(model, batch)
                optimizer.step()
        for _, optimizer in workers:
            optimizer.zero_grad()
            optimizer.step()  # pushes nothing and pulls
        torch.testing.assert_close(workers[1][0].state_dict(), workers[0][0].state_dict(), rtol=0, atol=0)
        assert [strategy.global_step for strategy in run.strategies] == [2 * STEPS + 1, 2 * STEPS + 2]


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_a_buffer_grows_by_the_sum_of_what_workers_moved_it_by(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with a_run(num_ps=2, num_workers=2) as run:
        workers = []
        for index in range(2):
            model, sums = Rebinding(), {"trace": "sum"}
            workers.append(run.strategy(index).prepare(model, optim.SGD(model.parameters(), lr=0.0), buffers=sums))
        (one, one_optimizer), (other, other_optimizer) = workers
        one.count = one.count + 5
        one.trace += 1
        other.count -= 2
        other.trace = other.trace * 4  # a move by 3
        one_optimizer.step()
        other_optimizer.step()
        one_optimizer.step()
        assert one.count.item() == other.count.item() == 3
        assert one.trace.tolist() == other.trace.tolist() == [5.0, 5.0, 5.0]


def test_a_buffer_that_leaves_infinity_is_assigned() -> None:
    with a_run(num_ps=1, num_workers=2) as run:
        workers = []
        for index in range(2):
            model = Peculiar()
            workers.append(run.strategy(index).prepare(model, optim.SGD(model.parameters(), lr=0.0)))
        (one, one_optimizer), (other, other_optimizer) = workers
        one.largest.fill_(7.0)
        one_optimizer.step()
        other_optimizer.step()
        assert other.largest.item() == 7.0
        assert other.mask.tolist() == one.mask.tolist() == [0.0, 0.0, -math.inf]


def test_a_second_prepare_in_a_cluster_is_refused() -> None:
    with a_run(num_ps=1) as run:
        strategy = run.strategy()
        model = net()
        strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))
        again = net()
        with pytest.raises(ps.errors.ConfigError, match="has prepared a model already, and a run trains one"):
            strategy.prepare(again, optim.SGD(again.parameters(), lr=0.1))


def test_a_worker_whose_model_differs_is_refused() -> None:
    with a_run(num_ps=1, num_workers=2) as run:
        model = net()
        run.strategy(0).prepare(model, optim.SGD(model.parameters(), lr=0.1))
        wider = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        with pytest.raises(ps.errors.ModelMismatchError, match=r"'0\.weight'") as refusal:
            run.strategy(1).prepare(wider, optim.SGD(wider.parameters(), lr=0.1))
        assert refusal.value.variable == "0.weight"


def test_a_task_that_finds_its_work_done_lets_the_run_end() -> None:
    with a_run(num_ps=2) as run:
        run.strategy().leave_unstarted()
        for server in run.servers:
            server.join()
