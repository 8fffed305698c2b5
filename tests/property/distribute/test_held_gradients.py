"""G1, G2, H1: programs that keep, change, share and move gradients see what they see in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.testing.local_cluster import LocalCluster

pytestmark = pytest.mark.filterwarnings("ignore:grad and param do not obey")  # of a gradient that is transposed


class Net(nn.Module):
    """A parameter of each way to its place: copied late, by a hook, and computed there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.large = nn.Linear(520, 520)  # more than 1 MiB
        self.middle = nn.Parameter(torch.randn(520, 16) / 20)
        self.tiny = nn.Parameter(torch.randn(16))

    def forward(self, features: Tensor) -> Tensor:
        return (torch.tanh(self.large(features)) @ self.middle * self.tiny).sum(1).square().mean()


def batch(number: int) -> Tensor:
    return torch.randn(4, 520, generator=torch.Generator().manual_seed(number))


class Program:
    """What a program holds; every act is done in the same way on a plain model."""

    def __init__(self, model: Net, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.held: list[Any] = []
        self.calls = 0

    @property
    def trained(self) -> list[Tensor]:
        return [each for each in self.model.parameters() if each.requires_grad]

    @property
    def gradients(self) -> list[Tensor]:
        return [each.grad for each in self.model.parameters() if each.grad is not None]

    def backward(self) -> None:
        self.calls += 1
        self.model(batch(self.calls)).backward()

    def backward_twice(self) -> None:
        self.backward()
        self.backward()

    def gradient_of_a_gradient(self) -> None:
        self.calls += 1
        loss = self.model(batch(self.calls))
        found = torch.autograd.grad(loss, self.trained, create_graph=True)
        (loss + sum(each.square().sum() for each in found)).backward()

    def autograd_grad(self) -> None:
        self.calls += 1
        found = torch.autograd.grad(self.model(batch(self.calls)), self.trained)
        self.held += [each.detach() for each in found]

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def keep(self) -> None:
        self.held += self.gradients

    def keep_detached(self) -> None:
        self.held += [each.detach() for each in self.gradients]

    def keep_data(self) -> None:
        self.held += [each.data for each in self.gradients]

    def keep_parts(self) -> None:
        self.held += [each[..., 1:3] for each in self.gradients]

    def keep_numpy(self) -> None:
        self.held += [each.numpy() for each in self.gradients]

    def let_go(self) -> None:
        self.held.clear()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)

    def scale(self) -> None:
        for each in self.gradients:
            each.mul_(1.5)

    def replace(self) -> None:
        """As gradient surgery does."""
        for each in self.model.parameters():
            if each.grad is not None:
                each.grad = each.grad * 0.5

    def detach(self) -> None:
        for each in self.model.parameters():
            if each.grad is not None:
                each.grad = each.grad.detach()

    def exchange(self) -> None:
        """The gradient of before, transposed: the same memory in another order."""
        if self.model.large.weight.grad is not None:
            self.model.large.weight.grad = self.model.large.weight.grad.t()

    def hook(self) -> None:
        self.model.middle.register_hook(lambda gradient: gradient * 2)

    def share_gradients(self) -> None:
        """As sending them through a queue of torch.multiprocessing does."""
        for each in self.gradients:
            each.share_memory_()

    def share_model(self) -> None:
        self.model.share_memory()

    def move_values(self) -> None:
        for each in self.model.parameters():
            each.data = each.data.clone()

    def freeze(self) -> None:
        self.model.tiny.requires_grad_(not self.model.tiny.requires_grad)

    def step(self) -> None:
        self.optimizer.step()


ACTS = [name for name, value in vars(Program).items() if callable(value) and not name.startswith("_")]
ACTS.remove("keep_numpy")  # torch frees the memory of an array when it moves the tensor's


def run(acts: list[str], prepare: Callable[[Any, Any], tuple[Any, Any]]) -> Iterator[list[Tensor]]:
    """All values, gradients and held gradients after every act."""
    model = Net()
    program = Program(*prepare(model, optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)))
    for act in acts:
        getattr(program, act)()
        seen = [each.detach() for each in program.model.parameters()]
        seen += [torch.as_tensor(each) for each in [*program.gradients, *program.held]]
        yield [each.clone() for each in seen]


def assert_as_plain(acts: list[str], prepare: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    plain, ours = run(acts, lambda *both: both), run(acts, prepare)
    for number, (expected, found) in enumerate(zip(plain, ours, strict=True)):
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            is_equal = torch.equal(one.view(torch.int32), other.view(torch.int32))
            assert is_equal, f"by {(one - other).abs().max():g} after {acts[: number + 1]}"


def program_of(acts: list[str]) -> list[str]:
    """A program that trains."""
    return [*acts, "forget", "backward", "step"]


PROGRAMS = st.lists(st.sampled_from([*ACTS, *["backward", "step", "forget"] * 4]), max_size=25).map(program_of)
KNOWN = {
    "gradients are kept over zero_grad": ["backward", "keep", "step", "forget", "backward", "step"],
    "gradients of tasks are kept, and combined": [
        *["backward", "keep", "forget"] * 3,
        *["backward", "keep", "replace", "step", "forget"] * 2,
    ],
    "what autograd.grad gave is kept": ["autograd_grad", "backward", "step", "forget", "autograd_grad", "backward"],
    "the model is shared": ["backward", "step", "share_model", *["forget", "backward", "step"] * 3],
    "gradients are shared": ["backward", "share_gradients", "step", *["forget", "backward", "step"] * 3],
    "a gradient is transposed": ["backward", "exchange", "step", "forget", "backward", "step"],
    "arrays are kept": ["backward", "keep_numpy", "step", "forget", "backward", "step"],
    "kept and let go": [
        "backward",
        "keep",
        "forget",
        "backward",
        "step",
        "let_go",
        *["forget", "backward", "step"] * 2,
    ],
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PROGRAMS)
def test_random_programs(acts: list[str]) -> None:
    assert_as_plain(acts, ps.ParameterServerStrategy().prepare)


@pytest.mark.parametrize("acts", [program_of(acts) for acts in KNOWN.values()], ids=list(KNOWN))
@pytest.mark.parametrize("lane", ["in process", "auto", "tcp"])
def test_known_programs(acts: list[str], lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lane == "in process":
        assert_as_plain(acts, ps.ParameterServerStrategy().prepare)
        return
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with LocalCluster(ps=2, workers=1) as cluster:
        strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
        assert_as_plain(acts, strategy.prepare)
        strategy.close()


@pytest.mark.parametrize("lane", ["auto", "tcp"])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(acts=PROGRAMS)
def test_random_programs_in_a_cluster(acts: list[str], lane: str) -> None:
    with pytest.MonkeyPatch.context() as patch, LocalCluster(ps=2, workers=1) as cluster:
        patch.setenv("PARAMSERVER_LANE", lane)
        strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
        assert_as_plain(acts, strategy.prepare)
        strategy.close()
