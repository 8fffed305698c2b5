"""Large linear layers that compute their gradient where it is pushed from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from paramserver.distribute.bound import direct_gradients
from paramserver.distribute.bound.direct_gradients import make_direct
from paramserver.distribute.bound.gradient_place import Gate, GradientPlace

FEATURES, CLASSES = 40, 24


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_gradients, "LARGE", 1)


class Twin:
    """One layer with a place for its gradient, and a plain one with the same values."""

    def __init__(self, *, bias: bool = True) -> None:
        torch.manual_seed(0)
        self.direct = nn.Linear(FEATURES, CLASSES, bias=bias)
        self.plain = copy.deepcopy(self.direct)
        self.view = torch.full_like(self.direct.weight, torch.nan).detach()
        place = GradientPlace(self.direct.weight, self.view, Gate())
        make_direct(self.direct, {id(self.direct.weight): place})

    @property
    def is_in_place(self) -> bool:
        gradient = self.direct.weight.grad
        return gradient is not None and gradient.data_ptr() == self.view.data_ptr()

    def assert_equal(self) -> None:
        for mine, theirs in zip(self.direct.parameters(), self.plain.parameters(), strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def _features(*shape: int) -> Tensor:
    return torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(7,), (3, 5), ()], ids=["batch", "sequence", "one vector"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_torchs_and_lies_in_its_place(shape: tuple[int, ...], bias: bool) -> None:
    twin, features = Twin(bias=bias), _features(*shape)
    for layer in (twin.direct, twin.plain):
        layer(features).square().sum().backward()
    assert twin.is_in_place
    twin.assert_equal()


def test_the_gradient_of_the_input_is_torchs() -> None:
    twin = Twin()
    mine, theirs = _features(4).requires_grad_(), _features(4).requires_grad_()
    twin.direct(mine).square().sum().backward()
    twin.plain(theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_a_second_backward_adds_to_the_first() -> None:
    twin, features = Twin(), _features(4)
    for layer in (twin.direct, twin.plain):
        layer(features).sum().backward()
        layer(features * 2).square().sum().backward()
    assert twin.is_in_place
    twin.assert_equal()


def test_a_layer_that_is_used_twice_in_one_forward_sums_both() -> None:
    twin, features = Twin(), _features(4)
    for layer in (twin.direct, twin.plain):
        (layer(features).sum() + layer(features * 3).square().sum()).backward()
    for mine, theirs in zip(twin.direct.parameters(), twin.plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_gradient_that_somebody_holds_is_not_overwritten() -> None:
    twin = Twin()
    (held,) = torch.autograd.grad(twin.direct(_features(4)).sum(), [twin.direct.weight])
    before = held.clone()
    twin.direct(_features(4) * 5).sum().backward()
    torch.testing.assert_close(held, before, rtol=0, atol=0)


def test_a_gradient_of_a_gradient_is_torchs() -> None:
    twin, features = Twin(), _features(4)
    for layer in (twin.direct, twin.plain):
        (gradient,) = torch.autograd.grad(layer(features).square().sum(), [layer.weight], create_graph=True)
        gradient.square().sum().backward()
    torch.testing.assert_close(twin.direct.weight.grad, twin.plain.weight.grad)


def test_a_frozen_weight_gets_no_gradient() -> None:
    twin = Twin()
    twin.direct.weight.requires_grad_(False)
    twin.direct(_features(4)).sum().backward()
    assert twin.direct.weight.grad is None
    assert twin.direct.bias.grad is not None
    assert twin.view.isnan().all()


def test_under_autocast_the_layer_is_torchs() -> None:
    twin, features = Twin(), _features(4)
    for layer in (twin.direct, twin.plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(features)
        assert output.dtype is torch.bfloat16
        output.float().square().sum().backward()
    twin.assert_equal()


def test_under_torch_func_the_layer_is_torchs() -> None:
    twin, features = Twin(), _features(4)
    per_example = torch.vmap(lambda row: twin.direct(row))(features)
    torch.testing.assert_close(per_example, twin.plain(features))


@pytest.mark.parametrize("batched", ["weight", "features"])
def test_batched_gradients_are_torchs(batched: str) -> None:
    """As ``is_grads_batched`` and vectorized jacobians ask for them, which no transform of torch.func tells."""
    twin, found = Twin(), []
    for layer in (twin.direct, twin.plain):
        features = _features(4).requires_grad_()
        wanted = layer.weight if batched == "weight" else features
        found.append(torch.autograd.grad(layer(features).sum(0), wanted, torch.eye(CLASSES), is_grads_batched=True)[0])
    torch.testing.assert_close(*found)
    assert twin.view.isnan().all(), "the place holds one gradient"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch makes its own forward rules with it
def test_forward_mode_derivatives_are_torchs() -> None:
    twin, found = Twin(), []
    for layer in (twin.direct, twin.plain):
        with forward_ad.dual_level():
            features = forward_ad.make_dual(_features(4), _features(4) * 2)
            found.append(forward_ad.unpack_dual(layer(features)).tangent.clone())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda layer: torch.jit.trace(layer, _features(4))])
def test_a_layer_that_torchscript_compiles_is_torchs(compiled: Any) -> None:
    twin = Twin()
    layer = compiled(twin.direct)
    layer(_features(4)).square().sum().backward()
    twin.plain(_features(4)).square().sum().backward()
    twin.assert_equal()


def test_a_copy_of_the_layer_has_a_place_of_its_own() -> None:
    twin = Twin()
    copied = copy.deepcopy(twin.direct)
    copied(_features(4)).sum().backward()
    assert twin.direct.weight.grad is None
    assert twin.view.isnan().all()


def test_small_layers_and_subclasses_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            return F.linear(features, self.weight * 2, self.bias)

    own, small = Own(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    make_direct(own, {id(own.weight): GradientPlace(own.weight, torch.zeros_like(own.weight), Gate())})
    monkeypatch.setattr(direct_gradients, "LARGE", 1 << 20)
    make_direct(small, {id(small.weight): GradientPlace(small.weight, torch.zeros_like(small.weight), Gate())})
    assert "forward" not in vars(own)
    assert "forward" not in vars(small)
