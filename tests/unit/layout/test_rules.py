"""Update rules equal torch.optim, step by step: one table of rules drives every property."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn, optim

from paramserver.errors import ConfigError, UnsupportedOptimizerError
from paramserver.layout.rules import RULES, Rule, describe
from paramserver.layout.settings import Setting, setting_names, settings
from paramserver.store.block_rule import BlockRule

Kwargs = dict[str, Any]  # arguments of a torch optimizer, which torch checks

# To test a new rule, add a row.
ROWS: list[tuple[str, Kwargs]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "maximize": True, "eps": 1e-5}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "amsgrad": True}),
    ("Adamax", {"lr": 0.01, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.01, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.01}),
    ("RAdam", {"lr": 0.01, "betas": (0.9, 0.9)}),
    ("RAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    ("Rprop", {"lr": 0.01}),
    ("Rprop", {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0), "maximize": True}),
    ("ASGD", {"lr": 0.01, "t0": 3.0, "lambd": 0.01, "weight_decay": 0.1}),
    ("Adadelta", {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1}),
]
SHAPES = [(7, 5), (1,), (33,), (4, 3, 2)]
SIZE = 93
STEPS = 12
# Fused kernels, of these rules and dtypes, round differently; everything else is exact.
FUSED = {"SGD", "Adagrad", "Adam", "AdamW"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
HALF = [torch.bfloat16, torch.float16]
# torch rounds half-precision elements twice where a tensor's end does not fill a vector register, and once
# elsewhere, so results depend on where an element lies. These shapes have no such end.
WHOLE_REGISTERS = [(2, 64), (64,), (8, 16)]

every_row = pytest.mark.parametrize(
    ("name", "kwargs"), ROWS, ids=[f"{name}-{'-'.join(map(str, kwargs))}" for name, kwargs in ROWS]
)


class Flat:
    """Several variables laid flat in one vector, which is cut into blocks at `cuts`."""

    def __init__(self, rule: Rule, values: Tensor, cuts: Sequence[int] = ()) -> None:
        self.values = values.clone()
        edges = [0, *cuts, len(values)]
        self.blocks = [(a, b, BlockRule(rule, self.values[a:b])) for a, b in itertools.pairwise(edges)]

    def apply(self, ranges: Iterable[tuple[int, int]], gradient: Tensor, numbers: dict[str, Setting]) -> None:
        for start, stop in ranges:
            for first, last, block in self.blocks:
                a, b = max(start, first), min(stop, last)
                if a < b:
                    block.apply(a - first, b - first, gradient[a:b].clone(), numbers)

    def slots(self) -> list[tuple[int, int, dict[str, Tensor]]]:
        return [
            (first + start, first + stop, {slot: tensor.clone() for slot, tensor in state.items()})
            for first, _, block in self.blocks
            for start, stop, state in block.slots()
        ]

    def load(self, slots: Iterable[tuple[int, int, dict[str, Tensor]]]) -> None:
        for start, stop, state in slots:
            for first, last, block in self.blocks:
                a, b = max(start, first), min(stop, last)
                if a < b:
                    piece = {k: v[a - start : b - start] if v.dim() else v for k, v in state.items()}
                    block.load(a - first, b - first, piece)


class Torch:
    """The same variables under torch.optim, the reference."""

    def __init__(
        self,
        name: str,
        kwargs: Kwargs,
        dtype: torch.dtype = torch.float32,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
    ) -> None:
        torch.manual_seed(1)
        self.variables = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        self.optimizer = RULES[name].optimizer(self.variables, **kwargs)
        stops = list(itertools.accumulate(variable.numel() for variable in self.variables))
        self.ranges = list(zip([0, *stops], stops, strict=False))

    def values(self) -> Tensor:
        return torch.cat([variable.detach().flatten() for variable in self.variables])

    def step(self, gradient: Tensor, present: Iterable[bool] = itertools.repeat(True)) -> None:
        for variable, (start, stop), here in zip(self.variables, self.ranges, present, strict=False):
            variable.grad = gradient[start:stop].view(variable.shape).clone() if here else None
        self.optimizer.step()

    def present(self, present: Sequence[bool]) -> list[tuple[int, int]]:
        """The ranges of the variables with a gradient, neighbours as one."""
        merged: list[tuple[int, int]] = []
        for start, stop in itertools.compress(self.ranges, present):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        return merged


def check_equal(actual: Tensor, expected: Tensor, name: str) -> None:
    tolerance = TOLERANCE.get(actual.dtype, 0.0) if name in FUSED else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(dtype: torch.dtype = torch.float32, steps: int = STEPS, size: int = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(steps)]


def numbers_of(reference: Torch) -> dict[str, Setting]:
    """What a push carries, after the way through a message."""
    rule = describe(reference.optimizer, 0)
    group = settings(reference.optimizer.param_groups[0], tuple(rule.settings))
    decoded: dict[str, Setting] = msgspec.msgpack.decode(msgspec.msgpack.encode(group))
    return decoded


def pair(name: str, kwargs: Kwargs, dtype: torch.dtype = torch.float32, cuts: Sequence[int] = ()) -> tuple[Torch, Flat]:
    reference = Torch(name, kwargs, dtype)
    return reference, Flat(describe(reference.optimizer, 0), reference.values(), cuts)


def test_the_table_has_a_row_for_every_rule() -> None:
    assert {name for name, _ in ROWS} == {name for name, rule in RULES.items() if rule.is_dense}


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torch_after_every_step(name: str, kwargs: Kwargs, dtype: torch.dtype) -> None:
    reference, flat = pair(name, kwargs, dtype)
    for gradient in gradients(dtype):
        reference.step(gradient)
        flat.apply([(0, SIZE)], gradient, numbers_of(reference))
        check_equal(flat.values, reference.values(), name)
    assert not torch.isnan(flat.values).any()


@every_row
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_exact(name: str, kwargs: Kwargs, dtype: torch.dtype) -> None:
    reference = Torch(name, kwargs, dtype, WHOLE_REGISTERS)
    values = reference.values()
    rule = BlockRule(describe(reference.optimizer, 0), values)
    for gradient in gradients(dtype, size=len(values)):
        reference.step(gradient)
        rule.apply(0, len(values), gradient, numbers_of(reference))
        # NAdam's eps is 0 in float16, so it divides 0 by 0, here and there alike.
        torch.testing.assert_close(values, reference.values(), rtol=0, atol=0, equal_nan=True)


@every_row
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_of_any_shape_differs_by_rounding_only(name: str, kwargs: Kwargs, dtype: torch.dtype) -> None:
    reference, flat = pair(name, kwargs, dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    for gradient in gradients(dtype):
        reference.step(gradient)
        flat.apply([(0, SIZE)], gradient, numbers_of(reference))
        torch.testing.assert_close(flat.values, reference.values(), rtol=tolerance, atol=tolerance, equal_nan=True)


@every_row
def test_slots_are_those_of_torch(name: str, kwargs: Kwargs) -> None:
    reference, flat = pair(name, kwargs)
    for gradient in gradients():
        reference.step(gradient)
        flat.apply([(0, SIZE)], gradient, numbers_of(reference))
    slots = flat.slots()
    states = [reference.optimizer.state.get(variable, {}) for variable in reference.variables]
    if not states[0]:
        assert slots == []
        return
    [(start, stop, state)] = slots
    assert (start, stop) == (0, SIZE)
    assert state.keys() == states[0].keys()
    for slot, tensor in state.items():
        scalar = tensor.dim() == 0
        whole = states[0][slot] if scalar else torch.cat([one[slot].flatten() for one in states])
        check_equal(tensor, whole, name)


@every_row
def test_skips_variables_without_a_gradient_as_torch_does(name: str, kwargs: Kwargs) -> None:
    reference, flat = pair(name, kwargs)
    generator = torch.Generator().manual_seed(3)
    patterns = [(torch.rand(4, generator=generator) < 0.6).tolist() for _ in range(STEPS)]
    assert not all(all(pattern) for pattern in patterns)
    for gradient, present in zip(gradients(), patterns, strict=True):
        reference.step(gradient, present)
        flat.apply(reference.present(present), gradient, numbers_of(reference))
        check_equal(flat.values, reference.values(), name)


@every_row
def test_a_push_may_cover_runs_with_and_without_state(name: str, kwargs: Kwargs) -> None:
    reference, flat = pair(name, kwargs)
    patterns = [[False, True, False, False], [True] * 4, [True] * 4]
    for gradient, present in zip(gradients(steps=3), patterns, strict=True):
        reference.step(gradient, present)
        flat.apply(reference.present(present), gradient, numbers_of(reference))
        check_equal(flat.values, reference.values(), name)


@every_row
def test_a_variable_may_be_cut_by_block_boundaries(name: str, kwargs: Kwargs) -> None:
    reference, flat = pair(name, kwargs, cuts=(10, 20, 50))
    for gradient, present in zip(gradients(), itertools.cycle([[True] * 4, [True, False] * 2]), strict=False):
        reference.step(gradient, present)
        flat.apply(reference.present(present), gradient, numbers_of(reference))
        check_equal(flat.values, reference.values(), name)


def one_cycle(optimizer: optim.Optimizer) -> optim.lr_scheduler.LRScheduler:
    group = optimizer.param_groups[0]
    cycles_momentum = "betas" in group or "momentum" in group
    return optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1, cycle_momentum=cycles_momentum)


def decay(optimizer: optim.Optimizer) -> optim.lr_scheduler.LRScheduler:
    return optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


@every_row
@pytest.mark.parametrize("schedule", [decay, one_cycle])
def test_follows_a_schedule(
    name: str,
    kwargs: Kwargs,
    schedule: Callable[[optim.Optimizer], optim.lr_scheduler.LRScheduler],
) -> None:
    if schedule is one_cycle and name in ("SGD", "RMSprop"):
        kwargs = {"momentum": 0.9, **kwargs}  # it cycles momentum, which must be on from the start
    reference, flat = pair(name, kwargs)
    scheduler = schedule(reference.optimizer)
    rates = []
    for gradient in gradients():
        numbers = numbers_of(reference)
        rates.append(numbers["lr"])
        reference.step(gradient)
        flat.apply([(0, SIZE)], gradient, numbers)
        scheduler.step()
        check_equal(flat.values, reference.values(), name)
    assert len(set(rates)) == STEPS


@every_row
@pytest.mark.parametrize("cuts", [(), (40,), (13, 36, 80)], ids=["same", "two", "four"])
@pytest.mark.parametrize("join", [False, True])
def test_goes_on_from_saved_slots(name: str, kwargs: Kwargs, cuts: tuple[int, ...], join: bool) -> None:
    """Slots of one set of blocks may be loaded into blocks with other boundaries."""
    reference, flat = pair(name, kwargs, cuts=(25,))
    numbers = numbers_of(reference)
    before, after = gradients()[:6], gradients()[6:]
    for gradient, ranges in zip(before, itertools.cycle([[(0, SIZE)], [(5, 30)]]), strict=False):
        flat.apply(ranges, gradient, numbers)
    restored = Flat(describe(reference.optimizer, 0), flat.values, cuts)
    restored.load(flat.slots())
    if join:
        for _, _, block in restored.blocks:
            block.join()
    for gradient in after:
        flat.apply([(0, SIZE)], gradient, numbers)
        restored.apply([(0, SIZE)], gradient, numbers)
        check_equal(restored.values, flat.values, name)


@every_row
def test_a_rule_survives_the_way_through_a_message(name: str, kwargs: Kwargs) -> None:
    rule = describe(RULES[name].optimizer([nn.Parameter(torch.zeros(3))], **kwargs), 0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rule), type=Rule) == rule
    assert {key: rule.settings[key] for key in kwargs} == kwargs


@every_row
def test_join_makes_one_run_of_what_was_loaded_in_pieces(name: str, kwargs: Kwargs) -> None:
    reference, flat = pair(name, kwargs)
    flat.apply([(0, SIZE)], gradients()[0], numbers_of(reference))
    restored = Flat(describe(reference.optimizer, 0), flat.values)
    block = restored.blocks[0][2]
    for start, stop in itertools.pairwise([0, 30, 31, SIZE]):
        for _, _, state in flat.slots():
            block.load(start, stop, {k: v[start:stop] if v.dim() else v for k, v in state.items()})
    block.join()
    assert repr(block).endswith("in 1 runs>")
    for (_, _, left), (_, _, right) in zip(restored.slots(), flat.slots(), strict=True):
        assert all(torch.equal(left[slot], right[slot]) for slot in right)


def test_join_leaves_runs_of_different_steps_apart() -> None:
    _, flat = pair("Adam", {})
    flat.apply([(0, 50)], gradients()[0], {})
    flat.apply([(0, 20), (20, 50)], gradients()[1], {})
    block = flat.blocks[0][2]
    assert repr(block) == f"<BlockRule Adam of {SIZE} in 3 runs>"
    block.join()
    assert [(start, stop) for start, stop, _ in block.slots()] == [(0, 50)]
    assert repr(block).endswith("in 2 runs>")


def test_settings_leave_out_what_is_not_mathematics() -> None:
    optimizer = optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)
    optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert "initial_lr" in optimizer.param_groups[0]
    expected = {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"}
    assert describe(optimizer, 0).settings.keys() == expected == set(setting_names(optim.AdamW))


def test_settings_are_plain_numbers() -> None:
    group = {"lr": torch.tensor(0.5), "betas": (torch.tensor(0.5), 0.25), "eps": torch.zeros(1).numpy()[0]}
    numbers = settings(group, ("lr", "betas", "eps"))
    assert numbers == {"lr": 0.5, "betas": (0.5, 0.25), "eps": 0.0}
    assert [type(number) for number in numbers.values()] == [float, tuple, float]


def test_a_setting_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a number or a tuple of numbers, got tensor"):
        settings({"lr": torch.zeros(2)}, ("lr",))


def test_each_param_group_has_its_own_settings() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = optim.SGD(groups, momentum=0.9)
    assert [describe(optimizer, index).settings["lr"] for index in (0, 1)] == [0.1, 0.2]


def test_adagrad_takes_its_initial_accumulator_from_the_defaults_as_torch_does() -> None:
    group = {"params": [nn.Parameter(torch.zeros(1))], "initial_accumulator_value": 5.0}
    optimizer = optim.Adagrad([group], initial_accumulator_value=0.5)
    assert describe(optimizer, 0).settings["initial_accumulator_value"] == 0.5
    assert next(iter(optimizer.state.values()))["sum"].item() == 0.5


class MySGD(optim.SGD):
    """A subclass of the user's own."""


class Adamm(optim.Optimizer):
    """An optimizer of the user's own."""


def other(name: str) -> optim.Optimizer:
    matrices = [nn.Parameter(torch.zeros(2, 2))]
    if not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")
    optimizer: optim.Optimizer = getattr(optim, name)(matrices)
    return optimizer


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LBFGS", "line search moves all parameters at once"),
        ("Muon", "orthogonalises whole matrices"),
        ("Adafactor", "row and column factors of whole matrices"),
        ("SparseAdam", "sparse gradients only"),
    ],
)
def test_a_rule_that_is_not_elementwise_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(UnsupportedOptimizerError, match=f"{name} cannot run .*{why}") as caught:
        describe(other(name), 0)
    assert caught.value.optimizer == name


def test_every_optimizer_of_torch_is_known_or_refused_with_its_own_reason() -> None:
    """A new optimizer of torch must be looked at: is it elementwise?"""
    found = {name for name, kind in vars(optim).items() if inspect.isclass(kind) and issubclass(kind, optim.Optimizer)}
    assert found - set(RULES) - {"Optimizer"} <= {"LBFGS", "Muon", "Adafactor", "SparseAdam"}


def test_a_subclass_is_refused_since_its_step_may_differ() -> None:
    optimizer = MySGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(UnsupportedOptimizerError, match=r"subclass of torch\.optim\.SGD .* use SGD itself"):
        describe(optimizer, 0)


def test_an_unknown_optimizer_gets_the_known_ones_and_the_nearest() -> None:
    optimizer = Adamm([nn.Parameter(torch.zeros(1))], {})
    with pytest.raises(UnsupportedOptimizerError, match=r"known are SGD, .*; did you mean 'Adam'\?"):
        describe(optimizer, 0)


def test_a_differentiable_optimizer_is_refused() -> None:
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], differentiable=True)
    with pytest.raises(UnsupportedOptimizerError, match="no autograd graph leads through"):
        describe(optimizer, 0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("adam", {}), "no update rule is called 'adam'.*did you mean 'Adam'"),
        (Rule("SGD", {"momentun": 0.9}), "SGD has no setting 'momentun'.*did you mean 'momentum'"),
        (Rule("SGD", {"foreach": True}), "SGD has no setting 'foreach'"),
        (Rule("SGD", {"lr": -1.0}), r"torch.optim.SGD refuses .*Invalid learning rate"),
    ],
)
def test_a_rule_from_a_peer_is_checked(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockRule(rule, torch.zeros(3))


def test_values_must_be_flat() -> None:
    with pytest.raises(ValueError, match=r"must be flat and contiguous, got \(2, 2\)"):
        BlockRule(Rule("SGD", {}), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("start", "stop", "gradient", "numbers", "message"),
    [
        (0, 2, torch.zeros(3), {}, r"for \[0, 2\) must have shape \(2,\).*got \(3,\)"),
        (0, 3, torch.zeros(3, dtype=torch.float64), {}, "torch.float32, got .*torch.float64"),
        (2, 5, torch.zeros(3), {}, r"\[2, 5\) is not a range of a block of 4"),
        (2, 6, torch.zeros(4), {}, r"\[2, 6\) is not a range of a block of 4"),
        (2, 2, torch.zeros(0), {}, r"\[2, 2\) is not a range"),
        (-1, 1, torch.zeros(2), {}, r"\[-1, 1\) is not a range"),
        (0, 4, torch.zeros(4), {"params": ()}, "Adam has no setting 'params'"),
    ],
)
def test_a_push_that_does_not_fit_is_refused(
    start: int, stop: int, gradient: Tensor, numbers: dict[str, Setting], message: str
) -> None:
    values = torch.ones(4)
    rule = BlockRule(Rule("Adam", {}), values)
    with pytest.raises(ValueError, match=message):
        rule.apply(start, stop, gradient, numbers)
    assert torch.equal(values, torch.ones(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avh": torch.zeros(2)}, "slot 'exp_avh' is unknown; this rule has step, exp_avg, exp_avg_sq"),
        ({"max_exp_avg_sq": torch.zeros(2)}, "slot 'max_exp_avg_sq' is unknown"),
        ({"exp_avg": torch.zeros(3)}, r"slot 'exp_avg' must have shape \(2,\), got \(3,\)"),
        ({"step": torch.zeros(1)}, r"slot 'step' must have shape \(\), got \(1,\)"),
        ({"exp_avg": torch.zeros(2, dtype=torch.float64)}, "slot 'exp_avg' must be torch.float32"),
        ({"exp_avg": None}, "slot 'exp_avg' is missing; got step, exp_avg_sq"),
    ],
)
def test_slots_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    rule = BlockRule(Rule("Adam", {}), torch.zeros(4))
    fitting = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    state = {name: slot for name, slot in {**fitting, **change}.items() if slot is not None}
    with pytest.raises(ValueError, match=message):
        rule.load(1, 3, state)
    assert list(rule.slots()) == []
    rule.load(1, 3, fitting)
    assert [(start, stop) for start, stop, _ in rule.slots()] == [(1, 3)]


@every_row
def test_what_is_reset_begins_again(name: str, kwargs: Kwargs) -> None:
    """And nothing else does: the elements beside it go on as they were."""
    reference, flat = pair(name, kwargs)
    for gradient in gradients()[:3]:
        flat.apply([(0, SIZE)], gradient, numbers_of(reference))
    (start, stop), others = reference.ranges[1], [*reference.ranges[:1], *reference.ranges[2:]]
    went_on = Flat(describe(reference.optimizer, 0), flat.values)
    went_on.load(flat.slots())
    begun = Flat(describe(reference.optimizer, 0), flat.values[start:stop])
    flat.blocks[0][2].reset(start, stop)
    for gradient in gradients()[3:6]:
        flat.apply([(0, SIZE)], gradient, numbers_of(reference))
        went_on.apply([(0, SIZE)], gradient, numbers_of(reference))
        begun.apply([(0, stop - start)], gradient[start:stop], numbers_of(reference))
    check_equal(flat.values[start:stop], begun.values, name)
    for first, last in others:
        check_equal(flat.values[first:last], went_on.values[first:last], name)


def test_slots_fit_once_their_settings_are_adopted() -> None:
    rule = BlockRule(Rule("SGD", {"lr": 0.1}), torch.zeros(2))
    state = {"momentum_buffer": torch.ones(2)}
    with pytest.raises(ValueError, match="slot 'momentum_buffer' is unknown"):
        rule.load(0, 2, state)
    rule.adopt({"lr": 0.1, "momentum": 0.9})
    rule.load(0, 2, state)
    with pytest.raises(ValueError, match="no setting 'params'"):
        rule.adopt({"params": 1.0})


def test_loaded_slots_and_gradients_are_not_kept() -> None:
    """Both are somebody else's memory: a mapped file, a lane's buffer."""
    rule, gradient = BlockRule(Rule("SGD", {"lr": 0.1, "momentum": 0.9}), torch.zeros(4)), torch.ones(4)
    rule.apply(0, 4, gradient, {})
    buffer = torch.ones(2)
    rule.load(0, 2, {"momentum_buffer": buffer})
    gradient.zero_()
    buffer.zero_()
    assert all(torch.equal(state["momentum_buffer"], torch.ones(2)) for _, _, state in rule.slots())
    assert all(run.parameter.grad is None for run in rule._runs)


def test_slot_bytes_counts_elements_and_scalars() -> None:
    rule = BlockRule(Rule("Adam", {}), torch.zeros(100))
    assert rule.slot_bytes == 0
    rule.apply(0, 100, torch.ones(100), {})
    assert rule.slot_bytes == 2 * 400 + 4
    rule.apply(0, 50, torch.ones(50), {})
    assert rule.slot_bytes == 2 * 400 + 2 * 4


@pytest.mark.parametrize("bad", [{"amsgrad": True}, {"betas": (0.9,)}], ids=str)
def test_settings_that_a_rule_with_slots_cannot_follow_change_nothing(bad: dict[str, Setting]) -> None:
    good: dict[str, Setting] = {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False}
    values, gradient = torch.zeros(4), torch.ones(4)
    rule = BlockRule(Rule("Adam", good), values)
    rule.apply(0, 4, gradient, good)
    before, ((_, _, slots),) = values.clone(), rule.slots()
    kept = {name: slot.clone() for name, slot in slots.items()}
    for _ in range(2):
        with pytest.raises((KeyError, ValueError)):
            rule.apply(0, 4, gradient, good | bad)
    assert torch.equal(values, before)
    assert all(torch.equal(slots[name], slot) for name, slot in kept.items())
    rule.apply(0, 4, gradient, good)
    other = BlockRule(Rule("Adam", good), again := torch.zeros(4))
    for _ in range(2):
        other.apply(0, 4, gradient, good)
    assert torch.equal(values, again)
