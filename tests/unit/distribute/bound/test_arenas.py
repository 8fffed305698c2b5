"""An arena that several replicas use: what of their gradients and buffers is pushed, and how values reach them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from paramserver.distribute.bound import parameters as bound_parameters
from paramserver.distribute.bound.arenas import Binding, BoundArena, TrainedArena
from paramserver.distribute.bound.buffers import BufferArena, ConstantArena, LocalBufferArena, Sharing
from paramserver.distribute.bound.gradient_place import Gate
from paramserver.distribute.bound.plan import Kind, RowRanges, collect, plan
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.placement import RoundRobin
from paramserver.transport.lane import WorkerMemory
from paramserver.wire.messages import Part

HOME = torch.device("cpu")
AWAY = torch.device("cpu", 0)
"""The same memory, but not the device that a tensor says it lies on: it stands for a GPU."""

TWO_WORKERS = Sharing(num_workers=2)

DEVICES = [[HOME, HOME], [AWAY, AWAY], [HOME, AWAY], [AWAY, HOME]]


@pytest.fixture(autouse=True, params=[0, bound_parameters.LATE_BYTES], ids=["at once", "late"])
def late_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes of gradients come home when a step begins, and not as soon as they are whole."""
    monkeypatch.setattr(bound_parameters, "LATE_BYTES", request.param)
    found: int = request.param
    return found


class Pushed:
    """The memory that lanes would send from; see `PushedMemory`."""

    def __init__(self, memory: WorkerMemory) -> None:
        self.gate = Gate()
        self.arena: BoundArena | None = None
        self._memory = memory

    def renew(self, ps: int) -> None:
        assert self.arena is not None
        self.arena.use_gradients(torch.zeros_like(self._memory.gradients[0]))


def bind(
    model: nn.Module,
    devices: Sequence[torch.device],
    *,
    mean: bool = True,
    direct: bool = False,
    row_ranges: RowRanges = lambda _: [],
    policy: str = "sum",
    sharing: Sharing = TWO_WORKERS,
) -> tuple[Any, ReplicaTensors]:
    """The only arena of a model, bound, its values those of the model."""
    parameters = list(model.parameters())
    optimizers = [optim.SGD(parameters, lr=0.1)] if parameters else []
    policies = {"*": policy} if not parameters else {}
    ((arena,),) = plan(collect(model, optimizers, policies), optimizers, RoundRobin().start(1), 1, row_ranges)
    memory = WorkerMemory(
        *([torch.zeros(arena.layout.size, dtype=arena.layout.torch_dtype)] for _ in range(2)), direct=direct
    )
    tensors = ReplicaTensors(model, optimizers, devices)
    binding = Binding(plan=arena, memory=memory, tensors=tensors)
    bound: BoundArena
    match arena.kind:
        case Kind.TRAINED:
            pushed = Pushed(memory)
            bound = TrainedArena(binding, optimizers[0].param_groups[0], pushed, mean=mean)
            pushed.arena = bound
        case Kind.CONSTANT:
            bound = ConstantArena(binding)
        case _ if direct:
            bound = LocalBufferArena(binding)
        case _:
            bound = BufferArena(binding, sharing)
    bound.offer_values()
    bound.values.copy_(bound.gradients)
    bound.bind()
    bound.refreshed()
    return bound, tensors


def parts_of(bound: BoundArena) -> list[Part]:
    """What a step pushes, which has all but the values that come back."""
    bound.gather()
    parts = bound.parts()
    bound.meanwhile()
    return parts


def on_each(tensors: ReplicaTensors, tensor: Tensor) -> list[list[float]]:
    return [each.tolist() for each in tensors.of(tensor)]


class Three(nn.Module):
    """Parameters at [0, 2), [16, 18) and [32, 34)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.full((2,), float(value))) for value in (1, 2, 3))


@pytest.fixture(params=DEVICES, ids=lambda devices: " and ".join("home" if d == HOME else "away" for d in devices))
def devices(request: pytest.FixtureRequest) -> list[torch.device]:
    return request.param


def give(tensors: ReplicaTensors, parameter: Tensor, *gradients: float | None) -> None:
    """A gradient for each replica, as autograd makes it."""
    for tensor, gradient in zip(tensors.of(parameter), gradients, strict=True):
        if gradient is not None:
            (tensor * gradient).sum().backward()


@pytest.mark.parametrize(("mean", "expected"), [(True, 2.0), (False, 4.0)])
def test_gradients_of_all_replicas_become_one(mean: bool, expected: float, devices: list[torch.device]) -> None:
    """W03."""
    model = Three()
    bound, tensors = bind(model, devices, mean=mean)
    for parameter in model.parameters():
        give(tensors, parameter, 1.0, 3.0)
    (part,) = parts_of(bound)
    assert (part.operation, part.ranges) == ("rule", None)
    assert [view.tolist() for view in bound.plan.layout.views(bound.gradients)] == [[expected, expected]] * 3


def test_a_gradient_that_a_replica_lacks_is_zero_and_one_that_all_lack_is_not_pushed(
    devices: list[torch.device],
) -> None:
    model = Three()
    bound, tensors = bind(model, devices)
    for _ in range(2):  # also where an older gradient lies in the memory
        give(tensors, model.a, 8.0, None)
        give(tensors, model.c, None, 4.0)
        (part,) = parts_of(bound)
        assert part.ranges == ((0, 2), (32, 34))
        assert [bound.gradients[start].item() for start, _ in part.ranges] == [4.0, 2.0]
        for parameter in model.parameters():
            give(tensors, parameter, 1.0, 1.0)
        assert parts_of(bound)[0].ranges is None
        for parameter in model.parameters():
            for each in tensors.of(parameter):
                each.grad = None
    assert parts_of(bound) == []


def test_a_step_leaves_the_gradients_of_the_replicas_alone(devices: list[torch.device]) -> None:
    """A program may keep them over steps, and add to them."""
    model = Three()
    bound, tensors = bind(model, devices)
    give(tensors, model.a, 1.0, 3.0)
    for _ in range(2):
        parts_of(bound)
        assert [each.grad.tolist() for each in tensors.of(model.a)] == [[1.0, 1.0], [3.0, 3.0]]
        assert bound.gradients[:2].tolist() == [2.0, 2.0]


def test_the_mean_of_large_gradients_does_not_overflow_in_half_precision(devices: list[torch.device]) -> None:
    model = Three().half()
    bound, tensors = bind(model, devices)
    give(tensors, model.a, 60000.0, 60000.0)
    parts_of(bound)
    assert bound.gradients[:2].tolist() == [60000.0, 60000.0]


def test_a_single_replica_at_home_has_its_gradients_in_the_memory_that_is_pushed(late_bytes: int) -> None:
    model = Three()
    bound, tensors = bind(model, [HOME])
    give(tensors, model.b, 5.0)
    if not late_bytes:
        assert model.b.grad.data_ptr() == bound.gradients[16:].data_ptr()
    assert parts_of(bound)[0].ranges == ((16, 18),)
    assert bound.gradients[16:18].tolist() == [5.0, 5.0]
    if late_bytes:
        assert model.b.grad.data_ptr() != bound.gradients[16:].data_ptr(), "what is copied late is not handed out"


def test_as_many_of_the_smallest_gradients_as_are_allowed_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_parameters, "LATE_BYTES", 2 * 8 + 1)
    model = Three()
    model.large = nn.Parameter(torch.zeros(3))
    bound, tensors = bind(model, [HOME])
    parameters = list(model.parameters())
    for parameter in parameters:
        give(tensors, parameter, 5.0)
    views = bound.plan.layout.views(bound.gradients)
    at_home = [parameter.grad.data_ptr() == view.data_ptr() for parameter, view in zip(parameters, views, strict=True)]
    assert at_home == [False, False, True, True]
    parts_of(bound)
    assert [view.tolist() for view in views] == [[5.0] * len(view) for view in views]


def test_late_gradients_that_add_up_are_pushed_whole(late_bytes: int) -> None:
    model = Three()
    bound, tensors = bind(model, [HOME])
    for step in (1.0, 2.0, 3.0):  # nobody forgets them in between
        for parameter in model.parameters():
            give(tensors, parameter, step)
        (part,) = parts_of(bound)
        assert part.ranges is None
    assert [view.tolist() for view in bound.plan.layout.views(bound.gradients)] == [[6.0, 6.0]] * 3


def test_late_gradients_that_have_a_graph_are_pushed_without_it(late_bytes: int) -> None:
    model = Three()
    bound, _ = bind(model, [HOME])
    for parameter in model.parameters():
        parameter.grad = 2 * parameter
    parts_of(bound)
    assert not bound.gradients.requires_grad
    assert [view.tolist() for view in bound.plan.layout.views(bound.gradients)] == [[2.0] * 2, [4.0] * 2, [6.0] * 2]


def test_what_a_step_pushes_is_the_same_part_until_a_setting_changes() -> None:
    model = Three()
    bound, tensors = bind(model, [HOME])
    for parameter in model.parameters():
        give(tensors, parameter, 1.0)
    first, again = parts_of(bound), parts_of(bound)
    assert again[0] is first[0]
    bound._settings._group["lr"] = 0.5
    assert parts_of(bound)[0].settings["lr"] == 0.5


def test_a_single_replica_elsewhere_has_blocks_of_its_own() -> None:
    model = Three()
    bound, tensors = bind(model, [AWAY])
    give(tensors, model.b, 5.0)
    assert model.b.grad.data_ptr() != bound.gradients[16:].data_ptr()
    parts_of(bound)
    assert bound.gradients[16:18].tolist() == [5.0, 5.0]
    bound.values.fill_(7.0)
    assert model.b.tolist() == [2.0, 2.0]
    bound.pulled()
    assert model.b.tolist() == [7.0, 7.0]


def test_what_is_pulled_reaches_every_replica(devices: list[torch.device]) -> None:
    model = Three()
    bound, tensors = bind(model, devices)
    assert on_each(tensors, model.c) == [[3.0, 3.0]] * 2
    bound.values.fill_(7.0)
    bound.pulled()
    assert on_each(tensors, model.c) == [[7.0, 7.0]] * 2


def test_only_replicas_elsewhere_have_copies_of_the_values(devices: list[torch.device]) -> None:
    model = Three()
    bound, tensors = bind(model, devices)
    shared = [each.data_ptr() == bound.values.data_ptr() for each in tensors.of(model.a)]
    assert shared == [device == HOME for device in devices]


def test_a_graph_that_is_older_than_the_values_is_refused_on_every_replica(devices: list[torch.device]) -> None:
    model = Three()
    bound, tensors = bind(model, devices)
    losses = [each.square().sum() for each in tensors.of(model.a)]
    for loss in losses:
        loss.backward(retain_graph=True)
    parts_of(bound)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --- partitioned parameters


class Table(nn.Module):
    """A parameter of five rows, which lie in two parts at [0, 6) and [16, 20)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.arange(10.0).view(5, 2))


def in_two(_: object) -> list[tuple[int, int]]:
    return [(0, 3), (3, 5)]


def test_parts_are_put_together_on_every_replica(devices: list[torch.device]) -> None:
    """P07."""
    model = Table()
    bound, tensors = bind(model, devices, row_ranges=in_two)
    assert on_each(tensors, model.rows) == [torch.arange(10.0).view(5, 2).tolist()] * 2
    bound.values[:6] = 7.0
    bound.values[16:20] = 8.0
    bound.pulled()
    assert on_each(tensors, model.rows) == [[[7, 7]] * 3 + [[8, 8]] * 2] * 2


def test_gradients_of_parts_are_those_of_their_rows(devices: list[torch.device]) -> None:
    """P07."""
    model = Table()
    bound, tensors = bind(model, devices, row_ranges=in_two)
    for scale, tensor in zip((1.0, 3.0), tensors.of(model.rows), strict=True):
        (tensor * torch.arange(5.0)[:, None] * scale).sum().backward()
    (part,) = parts_of(bound)
    assert part.ranges is None
    assert bound.gradients[:6].tolist() == [0, 0, 2, 2, 4, 4]
    assert bound.gradients[16:20].tolist() == [6, 6, 8, 8]
    assert not bound.gradients[6:16].any()


@pytest.mark.parametrize("replica", [0, 1])
def test_a_partitioned_parameter_that_a_program_has_moved_gets_its_values_where_it_is(
    replica: int, devices: list[torch.device]
) -> None:
    model = Table()
    bound, tensors = bind(model, devices, row_ranges=in_two)
    tensors.of(model.rows)[replica].data = tensors.of(model.rows)[replica].detach().clone()
    bound.check()
    parts_of(bound)
    bound.values.fill_(7.0)
    bound.pulled()
    assert on_each(tensors, model.rows) == [[[7.0, 7.0]] * 5] * 2


# --- buffers


class Buffers(nn.Module):
    """Buffers of one dtype."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


def apply(bound: BoundArena, parts: Sequence[Part]) -> None:
    """What a ps does with a push, and the pull after it."""
    for part in parts:
        for start, stop in part.ranges or [(0, len(bound.values))]:
            change = bound.gradients[start:stop]
            bound.values[start:stop] = change if part.operation == "assign" else bound.values[start:stop] + change
    bound.pulled()


@pytest.mark.parametrize("direct", [False, True])
def test_a_buffer_becomes_the_mean_of_the_replicas(direct: bool, devices: list[torch.device]) -> None:
    model = Buffers(torch.tensor([1.0, 2.0]))
    bound, tensors = bind(model, devices, direct=direct)
    one, other = tensors.of(model.value)
    one += torch.tensor([1.0, 0.0])
    other += torch.tensor([4.0, -1.0])
    parts = parts_of(bound)
    if not direct:  # else the memory is the store's own
        assert [part.operation for part in parts] == ["add"]
        assert bound.gradients.tolist() == [2.5, -0.5]
    apply(bound, parts)
    assert bound.values.tolist() == [3.5, 1.5]
    assert on_each(tensors, model.value) == [[3.5, 1.5]] * 2
    assert parts_of(bound) == []


def test_an_integer_buffer_becomes_the_first_replicas(devices: list[torch.device]) -> None:
    model = Buffers(torch.tensor([5]))
    bound, tensors = bind(model, devices)
    one, other = tensors.of(model.value)
    one += 1
    other += 7
    (part,) = parts_of(bound)
    assert (part.operation, bound.gradients.tolist()) == ("add", [1])
    apply(bound, [part])
    assert on_each(tensors, model.value) == [[6], [6]]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_boolean_buffer_becomes_that_of_the_replica_that_has_set_it(
    replica: int, direct: bool, devices: list[torch.device]
) -> None:
    model = Buffers(torch.tensor([False, False]))
    bound, tensors = bind(model, devices, direct=direct, policy="last")
    tensors.of(model.value)[replica][1] = True
    parts = parts_of(bound)
    if not direct:
        assert parts == [Part(0, "assign", ((0, 2),))]
    apply(bound, parts)
    assert on_each(tensors, model.value) == [[False, True]] * 2
    assert parts_of(bound) == []


@pytest.mark.parametrize("direct", [False, True])
def test_a_buffer_of_their_own_stays_each_replicas(direct: bool, devices: list[torch.device]) -> None:
    model = Buffers(torch.tensor([1.0]))
    bound, tensors = bind(model, devices, direct=direct, policy="own")
    one, other = tensors.of(model.value)
    one += 1
    other += 7
    apply(bound, parts_of(bound))
    assert bound.values.tolist() == [2.0]
    bound.refreshed()
    assert on_each(tensors, model.value) == [[2.0], [8.0]]


def test_a_worker_that_is_not_the_chief_pushes_nothing_of_its_own_buffers() -> None:
    model = Buffers(torch.tensor([1.0]))
    bound, _ = bind(model, [HOME], policy="own", sharing=Sharing(num_workers=2, is_chief=False))
    model.value += 1
    assert parts_of(bound) == []
    bound.values.fill_(7.0)  # the chief's
    bound.pulled()
    bound.refreshed()
    assert model.value.tolist() == [2.0]


def test_the_chiefs_own_buffers_are_those_of_a_checkpoint_once_there_is_one() -> None:
    model = Buffers(torch.tensor([1.0]))
    bound, _ = bind(model, [HOME], policy="own")
    model.value += 1
    bound.refreshed()
    assert model.value.tolist() == [2.0]
    bound.values.fill_(7.0)
    bound.refreshed()
    assert model.value.tolist() == [7.0]


def test_of_a_mean_each_worker_pushes_its_share() -> None:
    model = Buffers(torch.tensor([1.0]))
    bound, _ = bind(model, [HOME], policy="mean", sharing=Sharing(num_workers=4))
    model.value += 8
    (part,) = parts_of(bound)
    assert (part.operation, bound.gradients.tolist()) == ("add", [2.0])
    apply(bound, [part])
    assert model.value.tolist() == [3.0]


@pytest.mark.parametrize("policy", ["sum", "mean", "last", "own"])
def test_the_only_worker_assigns(policy: str) -> None:
    """A sum would round: 0.1 + (0.3 - 0.1) is not 0.3."""
    model = Buffers(torch.tensor([0.1], dtype=torch.float64))
    bound, _ = bind(model, [HOME], policy=policy, sharing=Sharing())
    model.value.fill_(0.3)
    parts = parts_of(bound)
    assert parts == [Part(0, "assign")]
    apply(bound, parts)
    assert bound.values.tolist() == model.value.tolist() == [0.3]


def test_of_what_is_assigned_whole_buffers_that_have_changed_are() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.zeros(3))
            self.register_buffer("scale", torch.tensor([1.0, torch.nan]))
            self.register_buffer("nothing", torch.zeros(0))

    model = Two()
    bound, _ = bind(model, [HOME], policy="last")
    assert parts_of(bound) == []
    model.queue[1] = 5.0
    parts = parts_of(bound)
    assert parts == [Part(0, "assign", ((0, 3),))]
    model.queue[2] = 6.0  # while the push is under way
    bound.values[:3] = torch.tensor([7.0, 5.0, 0.0])
    bound.values[16:18] = torch.tensor([2.0, 3.0])
    bound.pulled()
    assert model.queue.tolist() == [0.0, 5.0, 6.0], "not a mixture of two workers' values"
    assert model.scale.tolist() == [2.0, 3.0]
    assert parts_of(bound) == [Part(0, "assign", ((0, 3),))]


def test_what_is_put_in_the_place_of_a_buffer_while_a_push_is_under_way_does_not_undo_what_others_do() -> None:
    model = Buffers(torch.tensor([1.0]))
    bound, _ = bind(model, [HOME])
    model.value += 1
    parts = parts_of(bound)
    model.value = model.value + 10
    bound.values.fill_(102.0)  # another worker has added 100
    bound.pulled()
    assert model.value.tolist() == [112.0]
    assert parts == [Part(0, "add")]
    assert parts_of(bound) == [Part(0, "add")]
    assert bound.gradients.tolist() == [10.0]


def test_what_was_put_in_the_place_of_a_buffer_is_lost_by_a_refresh() -> None:
    model = Buffers(torch.tensor([1.0]))
    bound, _ = bind(model, [HOME])
    model.value = torch.tensor([5.0])
    bound.refreshed()
    assert model.value.tolist() == [1.0]
    assert parts_of(bound) == []


def test_a_replica_that_stays_at_infinity_makes_no_number_of_others(devices: list[torch.device]) -> None:
    inf = torch.inf
    model = Buffers(torch.tensor([-inf, -inf, inf, -inf]))
    bound, tensors = bind(model, devices)
    one, other = tensors.of(model.value)
    one[0] = 5.0
    other[1] = 5.0
    one[3], other[3] = 2.0, 4.0
    apply(bound, parts_of(bound))
    assert bound.values.tolist() == [5.0, -inf, inf, 3.0]


@pytest.mark.parametrize("begun", [False, True], ids=["before it begins", "after it has begun"])
def test_a_step_that_fails_changes_nothing_that_the_next_one_pushes(begun: bool, devices: list[torch.device]) -> None:
    model = Buffers(torch.tensor([10.0]))
    bound, tensors = bind(model, devices)
    for each in tensors.of(model.value):
        each += 1
    bound.gather()
    parts = bound.parts()
    if begun:
        change = bound.gradients.clone()
        for each in tensors.of(model.value):  # the program goes on before it is made up for
            each += 2
        bound.values += change
        bound.pulled()
    else:
        for each in tensors.of(model.value):
            each += 2
    assert [part.operation for part in parts] == ["add"]
    apply(bound, parts_of(bound))
    assert bound.values.tolist() == [13.0]
    assert on_each(tensors, model.value) == [[13.0]] * 2


@pytest.mark.parametrize("policy", ["sum", "last", "own"])
def test_a_step_that_fails_in_one_process_combines_nothing_twice(policy: str, devices: list[torch.device]) -> None:
    model = Buffers(torch.tensor([10.0]))
    bound, tensors = bind(model, devices, direct=True, policy=policy)
    one, other = tensors.of(model.value)
    one += 1
    other += 5
    for _ in range(3):
        bound.gather()
        assert bound.parts() == []
    bound.pulled()
    expected = {"sum": [[13.0]] * 2, "last": [[11.0]] * 2, "own": [[11.0], [15.0]]}
    assert on_each(tensors, model.value) == expected[policy]
    assert bound.values.tolist() == expected[policy][0]


def test_values_that_come_twice_are_taken_once(devices: list[torch.device]) -> None:
    """An interrupt may come before a step knows that it has taken them."""
    model = Buffers(torch.tensor([10.0]))
    bound, tensors = bind(model, devices)
    for each in tensors.of(model.value):
        each += 1
    apply(bound, parts_of(bound))
    bound.values += 5  # by another worker
    for each in tensors.of(model.value):
        each += 1
    bound.gather()
    bound.parts()
    bound.values += bound.gradients
    for _ in range(3):
        bound.pulled()
    assert on_each(tensors, model.value) == [[17.0]] * 2
