"""What torch does not offer under a public name: each test fails first when torch changes it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from paramserver.layout.variables import DTYPES
from paramserver.memory.torch_internals import (
    alias,
    all_threads,
    buffers_of,
    foreach_add,
    foreach_copy,
    fused_adagrad,
    fused_adam,
    fused_adamw,
    has_step_hooks,
    is_batched,
    is_scripting,
    is_tracing,
    is_transformed,
    modules_of,
    non_persistent_buffers,
    parameters_of,
    storage_uses,
    version_of,
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_alias_has_a_storage_and_a_count_of_its_own(dtype: torch.dtype) -> None:
    block = torch.zeros(10, dtype=dtype)
    one = alias(block[2:6].view(2, 2))
    assert (one.dtype, one.shape, one.data_ptr()) == (dtype, (2, 2), block[2:].data_ptr())
    assert one.untyped_storage().nbytes() == one.nbytes
    one.fill_(1)
    assert block.tolist()[2:6] == [1] * 4
    assert block._version == 0
    address = block[2:].data_ptr()
    one.share_memory_()
    assert one.data_ptr() != address
    assert block[2:].data_ptr() == address


def test_an_alias_keeps_the_memory_alive() -> None:
    block = torch.full((1000,), 7.0)
    part = alias(block[10:20])
    del block
    torch.zeros(1000).fill_(3.0)
    assert (part == 7).all()


def test_every_holder_of_a_storage_is_counted() -> None:
    tensor = torch.zeros(4)
    alone = storage_uses(tensor)
    assert storage_uses(torch.zeros(2)) == alone
    held = [tensor.detach(), tensor[1:], tensor.numpy(), tensor.data]
    assert storage_uses(tensor) > alone
    del held
    assert storage_uses(tensor) == alone


def test_gradients_that_autograd_has_made_are_held_by_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    alone, seen = storage_uses(torch.zeros(1)), list[int]()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: seen.append(storage_uses(each.grad)))
    model(torch.ones(2, 3)).sum().backward()
    assert seen == [alone] * 4


def test_a_tensor_that_is_given_other_memory_stays_the_parameters_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.sum().backward()
    gradient, place = parameter.grad, torch.zeros(3)
    gradient.data = alias(place).copy_(gradient)
    assert parameter.grad is gradient
    parameter.sum().backward()
    assert place.tolist() == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
def test_tracing_is_noticed() -> None:
    seen: list[bool] = []

    def traced(features: torch.Tensor) -> torch.Tensor:
        seen.append(is_tracing())
        return features + 1

    torch.jit.trace(traced, torch.ones(1), check_trace=False)
    assert seen == [True]
    assert not is_tracing()


def test_transforms_are_noticed() -> None:
    seen: list[bool] = []

    def transformed(features: torch.Tensor) -> torch.Tensor:
        seen.append(is_transformed())
        return features.sum()

    torch.vmap(transformed)(torch.ones(2, 2))
    torch.func.grad(transformed)(torch.ones(2))
    assert seen == [True, True]
    assert not is_transformed()


def test_batched_gradients_are_noticed() -> None:
    seen: list[bool] = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, features: torch.Tensor) -> torch.Tensor:
            return features.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(is_batched(gradient))
            return gradient

    features = torch.ones(2, requires_grad=True)
    Seen.apply(features).sum().backward()
    torch.autograd.grad(Seen.apply(features), features, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_scripting_is_noticed() -> None:
    def scripted(features: torch.Tensor) -> torch.Tensor:
        if is_scripting():
            return features + 1
        return features

    assert torch.jit.script(scripted)(torch.ones(1)).item() == 2
    assert scripted(torch.ones(1)).item() == 1


def test_a_deep_copy_of_an_alias_takes_its_own_bytes() -> None:
    copied = copy.deepcopy(alias(torch.zeros(1000)[:3]))
    assert copied.untyped_storage().nbytes() == 12


def test_fused_steps_are_those_of_the_public_optimizers() -> None:
    values, gradient, total = torch.ones(3), torch.full((3,), 2.0), torch.zeros(3)
    fused_adagrad(
        [values], [gradient], [total], [torch.tensor(1.0)], lr=0.1, lr_decay=0, weight_decay=0, eps=0, maximize=False
    )
    plain = nn.Parameter(torch.ones(3))
    plain.grad = gradient.clone()
    torch.optim.Adagrad([plain], lr=0.1, eps=0).step()
    assert torch.allclose(values, plain)
    for fused, kind in ((fused_adam, torch.optim.Adam), (fused_adamw, torch.optim.AdamW)):
        values, moments = torch.ones(3), [torch.zeros(3), torch.zeros(3)]
        fused(
            [values], [gradient], [moments[0]], [moments[1]], [], [torch.tensor(1.0)],
            lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0, eps=1e-8, maximize=False, amsgrad=False,
        )  # fmt: skip
        plain = nn.Parameter(torch.ones(3))
        plain.grad = gradient.clone()
        kind([plain], lr=0.1, weight_decay=0).step()
        assert torch.allclose(values, plain)


def test_several_tensors_are_added_to_at_once() -> None:
    numbers = [torch.zeros(()), torch.ones(())]
    foreach_add(numbers, 1)
    assert [number.item() for number in numbers] == [1, 2]


def test_writes_are_counted() -> None:
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) == before + 1


def test_what_a_module_holds_can_be_replaced() -> None:
    module = nn.BatchNorm1d(2)
    weight, mean = nn.Parameter(torch.full((2,), 3.0)), torch.full((2,), 4.0)
    parameters_of(module)["weight"], buffers_of(module)["running_mean"] = weight, mean
    assert module.weight is weight
    assert module.running_mean is mean


def test_modules_and_their_buffers_are_known() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    module[0].register_buffer("scratch", torch.zeros(1), persistent=False)
    assert modules_of(module) == {"0": module[0]}
    assert non_persistent_buffers(module[0]) == {"scratch"}


def test_tensors_are_copied_at_once() -> None:
    copies = [torch.zeros(2), torch.zeros(1)]
    foreach_copy(copies, [torch.ones(2), torch.ones(1)])
    assert [copy.tolist() for copy in copies] == [[1, 1], [1]]


def test_hooks_of_one_optimizer_and_of_all_are_seen() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    assert not has_step_hooks(optimizer)
    own = optimizer.register_step_pre_hook(lambda *_: None)
    assert has_step_hooks(optimizer)
    own.remove()
    everyones = register_optimizer_step_post_hook(lambda *_: None)
    assert has_step_hooks(optimizer)
    everyones.remove()
    assert not has_step_hooks(optimizer)


def test_a_profile_can_hold_all_threads() -> None:
    assert all_threads() is not None
