"""A model bound to memory: which parts of it a step pushes, and what is brought home."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn, optim

from paramserver.client.client import PushResult, PushTemplate, PushTimes
from paramserver.client.exchange import Meanwhile, nothing
from paramserver.distribute.bound.buffers import Sharing
from paramserver.distribute.bound.model import BoundModel, ModelBinding
from paramserver.distribute.bound.plan import Kind, collect, plan
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.reduce.reduction import ReduceOp
from paramserver.layout.arena import ArenaLayout
from paramserver.placement import RoundRobin
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part


class Client:
    """Keeps what is pushed; plays a ps that only takes values in and gives them back."""

    def __init__(self, layouts: Sequence[ArenaLayout]) -> None:
        self.memory = WorkerMemory(
            *([torch.zeros(layout.size, dtype=layout.torch_dtype) for layout in layouts] for _ in range(2))
        )
        self.parts: Sequence[Part] = ()
        self.pulled: Sequence[int] = ()
        self.push_times: Sequence[PushTimes] = ()

    def plan(self, parts: Sequence[Sequence[Part]], pull: Sequence[Sequence[int]]) -> list[PushTemplate]:
        return [PushTemplate(tuple(parts[0]), tuple(pull[0]), (), ())]

    def next_number(self) -> int:
        return 1

    def finish_push(self) -> None:
        """Nothing is ever under way."""

    def push_pull(
        self,
        plans: Sequence[PushTemplate],
        *,
        counts: bool,
        rows: None = None,
        meanwhile: Meanwhile = nothing,
        number: int | None = None,
    ) -> PushResult:
        (plan,) = plans
        self.parts, self.pulled = list(plan.parts), list(plan.pull)
        meanwhile()
        for part in self.parts:
            values, gradients = self.memory.values[part.arena], self.memory.gradients[part.arena]
            for start, stop in part.ranges or [(0, len(values))]:
                if part.operation == "assign":
                    values[start:stop] = gradients[start:stop]
                elif part.operation == "add":
                    values[start:stop] += gradients[start:stop]
        return PushResult(int(counts), 0)

    def pull(self, arenas: Sequence[Sequence[int]]) -> int:
        (self.pulled,) = arenas
        return 0


def bind(model: nn.Module, *optimizers: optim.Optimizer) -> tuple[BoundModel, Any]:
    policies = {"*": "sum"} if any(True for _ in model.buffers()) else {}
    arenas = plan(collect(model, optimizers, policies), optimizers, RoundRobin().start(1), num_ps=1)
    client: Any = Client([arena.layout for arena in arenas[0]])
    tensors = ReplicaTensors(model, optimizers, [torch.device("cpu")])
    sharing = Sharing(num_workers=2)
    bound = BoundModel(
        ModelBinding(
            arenas=arenas,
            memories=[client.memory],
            optimizers=optimizers,
            tensors=tensors,
            reduction=ReduceOp.MEAN,
            client=client,
            first_rows={},
            sharing=sharing,
        )
    )
    bound.assign()
    bound.bind()
    return bound, client


def linear() -> tuple[nn.Linear, BoundModel, Any]:
    """A weight at [0, 6), a gap, and a bias at [16, 18)."""
    model = nn.Linear(3, 2)
    return model, *bind(model, optim.SGD(model.parameters(), lr=0.1))


def test_binding_keeps_the_values() -> None:
    model = nn.Linear(3, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    _, client = bind(model, optim.SGD(model.parameters(), lr=0.1))
    assert all(map(torch.equal, model.parameters(), before))
    assert model.weight.data_ptr() == client.memory.values[0].data_ptr()


def test_gradients_lie_in_the_memory_that_is_pushed() -> None:
    model, bound, client = linear()
    model(torch.ones(1, 3)).sum().backward()
    bound.step()
    assert torch.equal(client.memory.gradients[0][: model.weight.numel()].view_as(model.weight), model.weight.grad)
    (part,) = client.parts
    assert (part.arena, part.operation, part.ranges) == (0, "rule", None)
    assert part.settings["lr"] == 0.1
    assert client.pulled == [0]


def test_the_gap_between_variables_stays_zero() -> None:
    model, bound, client = linear()
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        bound.step()
    assert not client.memory.gradients[0][6:16].any()


def test_only_what_has_a_gradient_is_pushed() -> None:
    model, bound, client = linear()
    model.bias.sum().backward()
    bound.step()
    assert client.parts[0].ranges == ((16, 18),)
    model.zero_grad()
    bound.step()
    assert client.parts == []
    assert client.pulled == [0]


def test_neighbours_that_have_a_gradient_are_one_range() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    bound, client = bind(model, optim.SGD(model.parameters(), lr=0.1))
    model[0](torch.ones(1, 3)).sum().backward()
    bound.step()
    assert client.parts[0].ranges == ((0, 18),)


def test_a_gradient_that_was_put_there_by_hand_is_brought_home() -> None:
    model, bound, client = linear()
    model.weight.grad = torch.full((2, 3), 7.0)
    bound.step()
    assert client.parts[0].ranges == ((0, 6),)
    assert client.memory.gradients[0][:6].tolist() == [7.0] * 6


def test_settings_are_read_at_every_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    bound, client = bind(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.param_groups[0].update(lr=torch.tensor(0.5), betas=(0.1, 0.2))
    bound.step()
    assert (client.parts[0].settings["lr"], client.parts[0].settings["betas"]) == (0.5, (0.1, 0.2))


class Buffers(nn.Module):
    """Nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving", torch.tensor([1.0, -math.inf, 3.0]))
        self.register_buffer("other", torch.tensor([1.0]))


def buffers() -> tuple[Any, BoundModel, Any]:
    """Buffers at [0, 3) and [16, 17)."""
    model = Buffers()
    return model, *bind(model)


def test_a_buffer_that_did_not_change_is_not_pushed() -> None:
    """Infinity less infinity is no move."""
    _, bound, client = buffers()
    bound.step()
    assert client.parts == []
    assert client.pulled == [0]


def test_what_a_buffer_moved_by_is_added() -> None:
    model, bound, client = buffers()
    model.moving[2] += 4
    bound.step()
    assert client.parts == [Part(0, "add")]
    model.other -= 1
    bound.step()
    assert client.parts == [Part(0, "add")]
    bound.step()
    assert client.parts == []


def test_the_moves_of_a_step_are_what_is_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bound, client = buffers()
    pushed: list[list[float]] = []
    push_pull = client.push_pull

    def keep(*args: Any, **options: Any) -> PushResult:
        pushed.append(client.memory.gradients[0][[0, 1, 2, 16]].tolist())
        result: PushResult = push_pull(*args, **options)
        return result

    monkeypatch.setattr(client, "push_pull", keep)
    model.moving[2] += 4
    model.other = model.other * 3
    bound.step()
    assert pushed == [[0.0, 0.0, 4.0, 2.0]]


def test_a_move_that_is_no_number_is_assigned() -> None:
    model, bound, client = buffers()
    model.moving[1] = 5.0
    model.other += 1
    bound.step()
    assert client.parts == [Part(0, "add", ((16, 17),)), Part(0, "assign", ((0, 3),))]


def test_a_buffer_that_was_replaced_is_put_back_with_its_new_value() -> None:
    model, bound, _ = buffers()
    place = model.moving
    model.moving = torch.tensor([1.0, 2.0, 3.0])
    bound.step()
    assert model.moving is place
    assert place.tolist() == [1.0, 2.0, 3.0]


def test_a_buffer_that_was_removed_is_refused() -> None:
    model, bound, _ = buffers()
    model.moving = None
    with pytest.raises(ValueError, match=r"'moving' is float32\[3\] on its ps, and the model has nothing"):
        bound.step()


# --- several optimizers


def two_optimizers() -> tuple[Any, BoundModel, Any]:
    """Arenas: the weight of the first optimizer, the bias of the second, and a buffer."""
    model: Any = nn.Linear(3, 2)
    model.register_buffer("average", torch.zeros(1))
    optimizers = [optim.SGD([model.weight], lr=0.1), optim.Adam([model.bias], lr=0.2)]
    return model, *bind(model, *optimizers)


def test_each_optimizer_pushes_and_pulls_what_it_holds() -> None:
    """Buffers, and the count of the global step, go with the first."""
    model, bound, client = two_optimizers()
    model(torch.ones(1, 3)).sum().backward()
    model.average += 1
    assert bound.step(1).global_step == 0
    assert [(part.arena, part.operation, part.settings["lr"]) for part in client.parts] == [(1, "rule", 0.2)]
    assert client.pulled == [1]
    assert bound.step(0).global_step == 1
    assert [(part.arena, part.operation) for part in client.parts] == [(0, "rule"), (2, "add")]
    assert client.pulled == [0, 2]


def test_only_what_was_pulled_is_taken_to_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen body of many gigabytes is copied once, not with every step."""
    model: Any = nn.ModuleList([nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)])
    model[2].requires_grad_(False)
    bound, client = bind(model, optim.SGD([*model[0].parameters(), model[2].bias], lr=0.1))
    arenas = [arena for each in bound._arenas for arena in each]
    pulled: list[int] = []
    for arena in arenas:
        monkeypatch.setattr(arena, "pulled", lambda index=arena.plan.index: pulled.append(index))
    kinds = {arena.plan.index: arena.plan.kind for arena in arenas}
    assert set(kinds.values()) == {Kind.TRAINED, Kind.FROZEN, Kind.CONSTANT, Kind.COUNTED}
    bound.step()
    assert pulled == client.pulled == [index for index in kinds if kinds[index] in (Kind.TRAINED, Kind.COUNTED)]


def test_a_frozen_parameter_is_pulled_when_it_is_trained() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    bound, client = bind(model, optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(1, 3)).sum().backward()
    bound.step()
    assert client.pulled == [0]
    model.bias.requires_grad_(True)
    model(torch.ones(1, 3)).sum().backward()
    bound.step()
    assert client.pulled == [0, 1]
