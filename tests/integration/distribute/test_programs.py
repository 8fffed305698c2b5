"""What a program may do to a prepared model or optimizer: docs/programs.md is the table of it.

Each program is run with plain PyTorch, in one process, and as the only worker of a cluster, over every lane. What it
returns is the same, bit for bit; or else it is refused, in one process and in a cluster alike.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # as everybody calls it
from safetensors.torch import load_model, save_model
from tests.patience import patience
from torch import Tensor, nn, optim
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import paramserver as ps
from paramserver import estimator as es
from paramserver.distribute.bound.direct_gradients import LARGE
from paramserver.errors import ConfigError, RefusedError
from paramserver.placement import FixedShards
from paramserver.testing.local_cluster import LocalCluster

TINY, BIG = 6, 520
"""Features of a linear layer of a few bytes, and of one whose gradient is computed where it is pushed from."""
STEPS = 3
WAYS = ["one process", "shared memory", "tcp"]
LANES = {"shared memory": "auto", "tcp": "tcp"}
PAGE = Path(__file__).parents[3] / "docs" / "programs.md"


@dataclass(kw_only=True)
class Run:
    """How a program is run.

    Attributes:
        prepare: Of the strategy, or what changes nothing.
        assign: As ``prepare``.
        size: `TINY` or `BIG`.
        folder: For the program's files.
    """

    prepare: Callable[..., Any]
    assign: Callable[[nn.Module], object]
    size: int
    folder: Path

    def net(self, make: Callable[[Any], optim.Optimizer] | None = None) -> tuple[Any, Any]:
        """A model that has been trained a little, and its optimizer."""
        model = net(self.size)
        model, optimizer = self.prepare(model, (make or sgd)(model.parameters()))
        train(model, optimizer)
        return model, optimizer


def sgd(parameters: Any) -> optim.Optimizer:
    """A rule that torch computes by one formula everywhere; fused kernels of others round otherwise."""
    return optim.SGD(parameters, lr=0.1)


def net(size: int = TINY) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 3))


def train(model: nn.Module, optimizer: Any, steps: int = STEPS, features: tuple[int, ...] = ()) -> None:
    """The loop that everybody writes."""
    generator = torch.Generator().manual_seed(1)
    size = features or (next(each for each in model.modules() if isinstance(each, nn.Linear)).in_features,)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(
            model(torch.randn(4, *size, generator=generator)), torch.randint(0, 3, (4,), generator=generator)
        ).backward()
        optimizer.step()


@contextlib.contextmanager
def a_way(way: str, monkeypatch: pytest.MonkeyPatch, folder: Path, size: int = TINY, **options: Any) -> Iterator[Run]:
    """Run what follows in one process, or as the only worker of a cluster of two ps tasks."""
    if way == "plain":
        yield Run(prepare=lambda model, optimizer, **_: (model, optimizer), assign=str, size=size, folder=folder)
    elif way == "one process":
        strategy = ps.ParameterServerStrategy(**options)
        yield Run(prepare=strategy.prepare, assign=strategy.assign, size=size, folder=folder)
    else:
        monkeypatch.setenv("PARAMSERVER_LANE", LANES[way])
        with LocalCluster(ps=2, workers=1) as cluster:
            strategy = ps.ParameterServerStrategy(
                cluster.resolver("chief:0"), session_creation_timeout=patience(30), **options
            )
            try:
                yield Run(prepare=strategy.prepare, assign=strategy.assign, size=size, folder=folder)
            finally:
                strategy.close()


class Row(NamedTuple):
    """A program of the table.

    Attributes:
        run: The program.
        sizes: For which it is run.
        tolerance: For what torch computes by other kernels in another place.
        refusal: The error that is expected instead of a result, and a part of its message.
        plain_refusal: What plain PyTorch raises, if it is refused there, too.
    """

    run: Callable[[Run], object]
    sizes: tuple[int, ...] = (TINY,)
    tolerance: float = 0.0
    refusal: tuple[type[Exception], str] | None = None
    plain_refusal: type[Exception] | None = None


ROWS: dict[str, Row] = {}


def row(**options: Any) -> Callable[[Callable[[Run], object]], Callable[[Run], object]]:
    """Put a program into the table."""

    def add(program: Callable[[Run], object]) -> Callable[[Run], object]:
        ROWS[program.__name__] = Row(program, **options)
        return program

    return add


EVERY_SIZE = (TINY, BIG)


def cases(*, refused: bool) -> list[Any]:
    return [
        pytest.param(each, size, id=f"{name}-{size}" if len(each.sizes) > 1 else name)
        for name, each in ROWS.items()
        if (each.refusal is not None) is refused
        for size in each.sizes
    ]


# --- copies, files, and other ways to compute


@row(sizes=EVERY_SIZE)
def saves_the_whole_model(run: Run) -> object:
    model, _ = run.net()
    file = io.BytesIO()
    torch.save(model, file)
    nbytes = sum(each.nbytes for each in model.state_dict().values())
    assert file.tell() < nbytes + 20_000, "nothing but the model's own memory is written"
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert all(type(each).forward is each.forward.__func__ for each in loaded)
    train(loaded, sgd(loaded.parameters()))
    return loaded.state_dict()


@row(sizes=EVERY_SIZE)
def pickles_the_model(run: Run) -> object:
    model, _ = run.net()
    loaded = pickle.loads(pickle.dumps(model))  # noqa: S301  # its own
    train(loaded, sgd(loaded.parameters()))
    return loaded.state_dict()


@row(sizes=EVERY_SIZE)
def copies_the_model_for_an_average(run: Run) -> object:
    model, optimizer = run.net()
    average = copy.deepcopy(model)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in average.state_dict().values()}
    assert sum(each.nbytes() for each in storages.values()) == sum(each.nbytes for each in model.state_dict().values())
    for _ in range(2):
        train(model, optimizer)
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)
    train(average, sgd(average.parameters()))
    return average.state_dict(), model.state_dict()


@row(sizes=EVERY_SIZE)
@pytest.mark.filterwarnings("ignore")
def scripts_the_model(run: Run) -> object:
    model, optimizer = run.net()
    scripted = torch.jit.script(model)
    train(model, optimizer)
    return scripted(torch.ones(2, run.size))


@row(sizes=EVERY_SIZE)
def traces_the_model(run: Run) -> object:
    model, optimizer = run.net()
    traced = torch.jit.trace(model, torch.ones(2, run.size))
    train(model, optimizer)
    return traced(torch.ones(2, run.size))


@row(sizes=EVERY_SIZE)
def compiles_the_model(run: Run) -> object:
    model, optimizer = run.net()
    train(torch.compile(model, backend="eager"), optimizer)
    return model.state_dict()


@row(sizes=EVERY_SIZE)
def prepares_a_compiled_model(run: Run) -> object:
    model = torch.compile(net(run.size), backend="eager")
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    features = torch.ones(2, run.size)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(features).square().sum().backward()
        optimizer.step()
    return model.state_dict()


@row(sizes=EVERY_SIZE)
def differentiates_forward(run: Run) -> object:
    model, _ = run.net()
    with forward_ad.dual_level():
        features = forward_ad.make_dual(torch.ones(2, run.size), torch.ones(2, run.size))
        return forward_ad.unpack_dual(model(features)).tangent.clone()


@row(sizes=EVERY_SIZE)
def differentiates_forward_by_its_weights(run: Run) -> object:
    model, _ = run.net()
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def output(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (torch.ones(2, run.size),))

    return torch.func.jvp(output, (weights,), (weights,))


@row(sizes=EVERY_SIZE, tolerance=1e-6)
def computes_a_vectorized_jacobian(run: Run) -> object:
    model, _ = run.net()
    model.zero_grad()
    features = torch.ones(2, run.size)
    backward = torch.autograd.functional.jacobian(model, features, vectorize=True)
    forward = torch.autograd.functional.jacobian(model, features, vectorize=True, strategy="forward-mode")
    return backward, forward


@row(sizes=EVERY_SIZE, tolerance=1e-6)
def computes_a_vectorized_hessian(run: Run) -> object:
    model, _ = run.net()
    model.zero_grad()
    return torch.autograd.functional.hessian(lambda x: model(x).square().sum(), torch.ones(run.size), vectorize=True)


@row(sizes=EVERY_SIZE, tolerance=1e-6)
def asks_for_many_gradients_at_once(run: Run) -> object:
    model, optimizer = run.net()
    model.zero_grad()
    output = model(torch.ones(2, run.size)).sum(0)
    found = torch.autograd.grad(output, list(model.parameters()), torch.eye(3), is_grads_batched=True)
    train(model, optimizer)
    return found, model.state_dict()


@row(sizes=EVERY_SIZE)
def saves_safetensors(run: Run) -> object:
    model, _ = run.net()
    file = run.folder / "model.safetensors"
    save_model(model, str(file))
    loaded = net(run.size)
    load_model(loaded, str(file))
    return loaded.state_dict()


@row(sizes=EVERY_SIZE)
def saves_the_head_alone(run: Run) -> object:
    model, _ = run.net()
    file = io.BytesIO()
    torch.save(model[2].state_dict(), file)
    assert file.tell() < sum(each.nbytes for each in model[2].parameters()) + 5_000
    return torch.load(io.BytesIO(file.getvalue()))


@row(sizes=EVERY_SIZE)
def loads_values_and_assigns_them(run: Run) -> object:
    """As Accelerate's ``load_state`` does."""
    model, optimizer = run.net()
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    model.load_state_dict(saved)
    run.assign(model)
    train(model, optimizer)
    return saved, model.state_dict()


# --- memory layouts


@row()
def keeps_channels_last(run: Run) -> object:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 3, 8, 8))
    model[2].requires_grad_(False)
    model.register_buffer("filter", torch.rand(2, 3, 4, 4))
    model = model.to(memory_format=torch.channels_last)
    strides = [each.stride() for each in (model[0].weight, model[2].weight, model.filter)]
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    for step in range(STEPS):
        optimizer.zero_grad()
        features = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        model(features.to(memory_format=torch.channels_last)).square().sum().backward()
        model.filter.mul_(0.5)
        optimizer.step()
        assert [each.stride() for each in (model[0].weight, model[2].weight, model.filter)] == strides
    return model.state_dict()


@row()
def keeps_a_transposed_weight(run: Run) -> object:
    model = net()
    model[0].weight.data = torch.randn(TINY, TINY).t()
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    assert model[0].weight.stride() == (1, TINY)
    return model.state_dict()


@row()
def trains_parameters_without_elements(run: Run) -> object:
    model = net()
    model.empty, model.last = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    for loss in (lambda: model.empty.sum(), lambda: model.empty.sum() + model.last.sum()):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return model.state_dict()


@row()
def trains_nothing_but_parameters_without_elements(run: Run) -> object:
    model = nn.ParameterList([torch.empty(0, 3), torch.empty(2, 0)])
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    sum(each.sum() for each in model).backward()
    optimizer.step()
    return model.state_dict()


# --- buffers


class Flagged(nn.Module):
    """Finds its scale in its first batch, and notes in a flag that it has."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(TINY, 3)
        self.in_place = in_place
        self.register_buffer("is_set", torch.tensor(False))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        if not self.is_set:
            self.scale = features.abs().max()[None]
            if self.in_place:
                self.is_set.fill_(True)
            else:
                self.is_set = torch.tensor(True)
        return self.linear(features / self.scale)


@row()
def sets_a_flag_in_place_in_the_first_forward(run: Run) -> object:
    model = Flagged(in_place=True)
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    run.assign(model)
    return model.state_dict()


@row()
def sets_a_flag_by_assignment_in_the_first_forward(run: Run) -> object:
    model = Flagged(in_place=False)
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    model.scale = model.scale * 2
    run.assign(model)
    train(model, optimizer)
    return model.state_dict()


class Buffers(nn.Module):
    """Buffers of all kinds of names, changed in all kinds of ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(TINY, 5)
        self.norm = nn.BatchNorm1d(5)
        self.output = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3))
        self.register_buffer("queue", torch.zeros(7, 5))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("largest", torch.tensor(-torch.inf))
        self.register_buffer("mean", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, features: Tensor) -> Tensor:
        inner = self.norm(self.linear(features))
        with torch.no_grad():
            self.queue[(self.pointer + torch.arange(len(inner))) % len(self.queue)] = inner
            self.pointer[0] = (self.pointer[0] + len(inner)) % len(self.queue)
            self.largest = torch.maximum(self.largest, inner.max())
            self.mean.mul_(0.9).add_(0.1 * inner.mean())
            self.seen[int(self.pointer) % 3] = True
        return self.output(inner)


def _changes_buffers(policy: str | None) -> Callable[[Run], object]:
    def program(run: Run) -> object:
        model = Buffers()
        buffers = {"*": policy} if policy else None
        if policy in ("sum", "mean"):
            names = ("norm.running_*", "queue", "largest", "mean")
            buffers = dict.fromkeys(names, policy)
        model, optimizer = run.prepare(model, sgd(model.parameters()), buffers=buffers)
        train(model, optimizer, 2 * STEPS)
        return model.state_dict()

    return program


for _policy in (None, "sum", "mean", "last", "own"):
    ROWS[f"changes_buffers_by_the_policy_{_policy or 'default'}"] = Row(_changes_buffers(_policy))


@row(refusal=(ConfigError, r"'queue' is float32\[2\] on its ps, and the model has float32\[3\].*as large as it will"))
def grows_a_buffer(run: Run) -> object:
    model = net()
    model.register_buffer("queue", torch.zeros(2))
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    model.queue = torch.cat([model.queue, torch.ones(1)])
    train(model, optimizer)
    return model.state_dict()


@row(refusal=(ConfigError, r"buffers: 'quue' fits no buffer of the model; persistent buffers are 'queue'; did you"))
def chooses_a_policy_for_no_buffer(run: Run) -> object:
    model = net()
    model.register_buffer("queue", torch.zeros(2))
    run.prepare(model, sgd(model.parameters()), buffers={"quue": "own"})
    return None


@row(refusal=(ConfigError, r"buffers: 'count' is int64, and a mean needs a floating point dtype"))
def averages_integers(run: Run) -> object:
    model = net()
    model.register_buffer("count", torch.tensor(0))
    return run.prepare(model, sgd(model.parameters()), buffers={"count": "mean"}) and None


# --- tied weights


@row()
def ties_weights_by_one_parameter(run: Run) -> object:
    model = nn.Sequential(nn.Linear(TINY, TINY), nn.Tanh(), nn.Linear(TINY, TINY))
    model[2].weight = model[0].weight
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    assert model[2].weight is model[0].weight
    return model.state_dict()


@row(refusal=(ConfigError, r"'0\.weight' and '2\.weight' are two tensors that share memory"))
def ties_weights_by_their_data(run: Run) -> object:
    model = nn.Sequential(nn.Linear(TINY, TINY), nn.Tanh(), nn.Linear(TINY, TINY))
    model[2].weight.data = model[0].weight.data
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    return model.state_dict()


@row(refusal=(ConfigError, r"'0\.weight' and 'rows' are two tensors that share memory"))
def has_a_buffer_that_is_a_view_of_a_weight(run: Run) -> object:
    model = net()
    model.register_buffer("rows", model[0].weight.detach()[2:4], persistent=False)
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    return model.rows


@row()
def lays_parameters_into_one_tensor(run: Run) -> object:
    model = net()
    flat, columns = torch.randn(TINY), torch.randn(3, 2 * TINY)
    model[0].bias.data, model[2].bias.data = torch.zeros(9)[:TINY], torch.zeros(9)[TINY:]
    model[2].weight.data, model.other = columns[:, :TINY], nn.Parameter(columns[:, TINY:])
    model.first, model.second = nn.Parameter(flat[:2]), nn.Parameter(flat[2:])
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    return model.state_dict()


# --- the model and the optimizer after prepare


@row()
def removes_a_param_group(run: Run) -> object:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    model, optimizer = run.prepare(model, sgd(groups))
    train(model, optimizer)
    del optimizer.param_groups[1]
    model.zero_grad()
    train(model, optimizer)
    return model.state_dict()


@row()
def removes_parameters_and_puts_them_back(run: Run) -> object:
    model, optimizer = run.net()
    (group,) = optimizer.param_groups
    everything = group["params"]
    group["params"] = [each for each in everything if each is not model[0].weight]
    train(model, optimizer)
    del group["params"][1:]
    train(model, optimizer)
    group["params"] = everything
    train(model, optimizer)
    return model.state_dict()


@row(refusal=(ConfigError, r"parameter of shape \[3, 3\], which the prepared model does not have, was put into"))
def puts_a_new_parameter_into_a_group(run: Run) -> object:
    model, optimizer = run.net()
    model.append(nn.Linear(3, 3))
    optimizer.param_groups[0]["params"].extend(model[3].parameters())
    train(model, optimizer)
    return model.state_dict()


@row(refusal=(ConfigError, r"parameter '2\.bias' was put into a param group after prepare, and no ps updates it"))
def puts_a_parameter_of_the_model_into_a_group(run: Run) -> object:
    model = net()
    model, optimizer = run.prepare(model, sgd([*model[0].parameters(), model[2].weight]))
    optimizer.param_groups[0]["params"].append(model[2].bias)
    train(model, optimizer)
    return model.state_dict()


@row(refusal=(ConfigError, "add_param_group: a prepared optimizer cannot take more parameters"))
def adds_a_param_group(run: Run) -> object:
    model, optimizer = run.net()
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[3].parameters()})
    return None


@row(refusal=(ConfigError, r"parameter '2\.bias' was moved to another param group"))
def moves_a_parameter_to_another_group(run: Run) -> object:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
    model, optimizer = run.prepare(model, sgd(groups))
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    train(model, optimizer)
    return model.state_dict()


@row(refusal=(ConfigError, "a param group was replaced by another dict, whose settings would not be seen"))
def replaces_a_param_group(run: Run) -> object:
    model, optimizer = run.net()
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.01}
    train(model, optimizer)
    return model.state_dict()


@row()
def changes_settings(run: Run) -> object:
    model, optimizer = run.net()
    optimizer.param_groups[0].update(lr=0.01, weight_decay=0.1)
    train(model, optimizer)
    optimizer.param_groups[0]["maximize"] = True
    train(model, optimizer)
    return model.state_dict()


def _switches_on(rule: type[optim.Optimizer], name: str, value: object) -> Callable[[Run], object]:
    def program(run: Run) -> object:
        model, optimizer = run.net(lambda parameters: rule(parameters, lr=0.1))
        optimizer.param_groups[0][name] = value
        train(model, optimizer)
        return model.state_dict()

    return program


for _rule, _name, _value, _slot in (
    (optim.Adam, "amsgrad", True, "max_exp_avg_sq"),
    (optim.AdamW, "amsgrad", True, "max_exp_avg_sq"),
    (optim.RMSprop, "centered", True, "grad_avg"),
    (optim.RMSprop, "momentum", 0.9, "momentum_buffer"),
):
    ROWS[f"switches_on_{_name}_of_{_rule.__name__}"] = Row(
        _switches_on(_rule, _name, _value),
        refusal=(RefusedError, f"{_rule.__name__} was made with {_name} off, .* has no '{_slot}'"),
        plain_refusal=KeyError,
    )


@row()
def switches_on_amsgrad_before_the_first_step(run: Run) -> object:
    model = net()
    model, optimizer = run.prepare(model, optim.Adam(model.parameters(), lr=0.1, foreach=False))
    optimizer.param_groups[0]["amsgrad"] = True
    model[0].weight.sum().backward()
    optimizer.step()
    return optimizer.param_groups[0]["amsgrad"]


@row()
def puts_another_parameter_in_the_place_of_one(run: Run) -> object:
    """The optimizer goes on to hold the old one."""
    model, optimizer = run.net()
    model[0].weight = nn.Parameter(torch.ones(TINY, TINY))
    train(model, optimizer)
    model.load_state_dict(net().state_dict(), assign=True)
    train(model, optimizer)
    return model.state_dict()


@row()
def adds_and_removes_modules(run: Run) -> object:
    model = nn.Sequential(nn.Linear(TINY, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model, optimizer = run.prepare(model, sgd(model.parameters()))
    train(model, optimizer)
    del model[1]
    model.append(nn.Linear(3, 3))
    train(model, optimizer)
    return model.state_dict()


class OwnError(Exception):
    """A program's own."""


@row()
def raises_inside_a_step(run: Run) -> object:
    model, optimizer = run.net()

    def fail(*_: object) -> None:
        raise OwnError("the program's")

    with pytest.raises(OwnError, match="^the program's$"):
        optimizer.step(fail)
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        hook = register(fail)
        with pytest.raises(OwnError, match="^the program's$"):
            optimizer.step()
        hook.remove()
        train(model, optimizer)
    return model.state_dict()


# --- tables


def table(run: Run) -> tuple[Any, Any]:
    model = nn.Embedding(10, 3, sparse=True)
    model, optimizer = run.prepare(model, optim.SGD(model.parameters(), lr=0.1))
    look_up(model, optimizer)
    return model, optimizer


def look_up(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.tensor([1, 7])).square().sum().backward()
    optimizer.step()


@row()
def compiles_a_table(run: Run) -> object:
    model, optimizer = table(run)
    look_up(torch.compile(model, backend="eager"), optimizer)
    return model.state_dict()


@row()
def calls_a_table_with_other_weights(run: Run) -> object:
    model, _ = table(run)
    return torch.func.functional_call(model, {"weight": torch.ones(10, 3)}, (torch.tensor([3, 4]),))


@row()
def removes_a_table_from_the_optimizer(run: Run) -> object:
    model, optimizer = table(run)
    optimizer.param_groups[0]["params"].clear()
    look_up(model, optimizer)
    return model.state_dict()


@row(refusal=(TypeError, r"'weight' is a table .* cannot be pickled; save model.state_dict\(\)"))
def pickles_a_table(run: Run) -> object:
    return pickle.dumps(table(run)[0]) and None


@row(refusal=(TypeError, r"rows of 'weight': torch.jit.trace cannot look rows up"))
def traces_a_table(run: Run) -> object:
    return torch.jit.trace(table(run)[0], torch.tensor([1])) and None


@row(refusal=(TypeError, r"rows of 'weight': torch.jit.script and torch.export cannot look rows up"))
@pytest.mark.filterwarnings("ignore")
def scripts_a_table(run: Run) -> object:
    return torch.jit.script(table(run)[0]) and None


@row(refusal=(TypeError, r"rows of 'weight': a transform of torch.func cannot look rows up"))
def maps_over_a_table(run: Run) -> object:
    return torch.vmap(table(run)[0])(torch.tensor([[3, 4]])).shape and None


# --- the table


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("program", "size"), cases(refused=False))
def test_the_same(program: Row, size: int, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = outcome(program, size, "plain", monkeypatch, tmp_path)
    found = outcome(program, size, way, monkeypatch, tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=program.tolerance, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("program", "size"), cases(refused=True))
def test_refused(
    program: Row,
    size: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = contextlib.nullcontext() if program.plain_refusal is None else pytest.raises(program.plain_refusal)
    with expected:
        outcome(program, size, "plain", monkeypatch, tmp_path)
    assert program.refusal is not None
    kind, message = program.refusal
    with pytest.raises(kind, match=message):
        outcome(program, size, way, monkeypatch, tmp_path)
    assert "Traceback" not in caplog.text


def outcome(program: Row, size: int, way: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> object:
    torch.manual_seed(0)
    with a_way(way, monkeypatch, folder, size) as run:
        return detached(program.run(run))


def detached(found: Any) -> Any:
    """What a program returned, as it is now."""
    if isinstance(found, Tensor):
        return found.detach().clone()
    if isinstance(found, dict):
        return {name: detached(each) for name, each in found.items()}
    return [detached(each) for each in found] if isinstance(found, (list, tuple)) else found


@pytest.mark.parametrize("way", LANES)
def test_a_copy_of_a_model_with_a_table_takes_no_memory_for_it(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with a_way(way, monkeypatch, tmp_path) as run:
        model, optimizer = table(run)
        for copied in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
            assert copied.weight.untyped_storage().nbytes() == 4
            look_up(model, optimizer)
            assert torch.equal(copied(torch.arange(10)), model(torch.arange(10)))
            torch.testing.assert_close(copied.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_copy_of_a_model_with_a_table_sees_the_same_rows_in_one_process_too() -> None:
    strategy = ps.ParameterServerStrategy()
    run = Run(prepare=strategy.prepare, assign=strategy.assign, size=TINY, folder=Path())
    model, optimizer = table(run)
    copied = copy.deepcopy(model)
    look_up(model, optimizer)
    assert torch.equal(copied(torch.arange(10)), model(torch.arange(10)))
    torch.testing.assert_close(copied.state_dict(), model.state_dict(), rtol=0, atol=0)


class Interrupting(TorchFunctionMode):
    """Code of the program that runs in the middle of an update, as a signal's handler may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("paramserver.store"):
            raise OwnError("the program's")
        return func(*args, **(kwargs or {}))


def test_a_programs_own_error_in_the_middle_of_an_update_is_no_refusal() -> None:
    model = net()
    model, optimizer = ps.ParameterServerStrategy().prepare(model, sgd(model.parameters()))
    model[0].weight.sum().backward()
    with Interrupting(), pytest.raises(OwnError, match="^the program's$"):
        optimizer.step()
    with pytest.raises(RefusedError, match="it was interrupted in the middle of part 1"):
        optimizer.step()
    optimizer.step()


def test_names_of_partitioned_variables_are_kept_apart_in_checkpoints(tmp_path: Path) -> None:
    names = ["w", "W", "n" * 300, "N" * 300]

    def model_fn(mode: es.ModeKeys) -> es.EstimatorSpec:
        torch.manual_seed(0)
        model = nn.ParameterDict({name: torch.randn(4, 2) for name in names})
        return es.EstimatorSpec(
            mode,
            model=model,
            loss_fn=lambda model, features, _: sum((model[name] * features).sum() for name in names),
            optimizer=sgd(model.parameters()),
        )

    strategy = ps.ParameterServerStrategy(variable_partitioner=FixedShards(2))
    config = es.RunConfig(model_dir=str(tmp_path), train_distribute=strategy)
    trained = es.Estimator(model_fn, config=config)
    trained.train(lambda: [torch.ones(1)] * 2)
    torch.manual_seed(0)
    for name in names:
        expected = torch.randn(4, 2) - 0.1 - 0.1
        torch.testing.assert_close(torch.as_tensor(trained.get_variable_value(name)), expected, rtol=0, atol=1e-6)
    files = {path.name.casefold() for path in Path(trained.latest_checkpoint()).glob("model-*")}
    assert len(files) == len(names)


def test_the_large_size_is_one_whose_gradients_are_direct() -> None:
    assert net(BIG)[0].weight.nbytes >= LARGE > net(TINY)[0].weight.nbytes


def test_the_page_has_a_line_for_each_program_and_none_more() -> None:
    named = re.findall(r"`(\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(ROWS)
