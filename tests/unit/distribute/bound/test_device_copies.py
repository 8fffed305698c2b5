"""Copies between the lanes' memory and GPUs, with a stand-in for ``torch.cuda``: what waits for what.

The stand-in's devices are the CPU, which does everything at once; what it keeps is the order that was asked for.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from paramserver.client.client import PushResult, PushTemplate
from paramserver.client.exchange import Meanwhile, nothing
from paramserver.distribute.bound import device_copies
from paramserver.distribute.bound.device_copies import CudaCopies, HostCopies, choose
from paramserver.distribute.bound.model import BoundModel, ModelBinding, PipelinedModel
from paramserver.distribute.bound.plan import collect, plan
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.reduce.reduction import ReduceOp
from paramserver.layout.arena import ArenaLayout
from paramserver.placement import RoundRobin
from paramserver.transport.lane import WorkerMemory

CPU = torch.device("cpu")
GPUS = [torch.device("cpu", 0), torch.device("cpu", 1)]
"""Not the device that a tensor says it lies on: they stand for GPUs."""

HOST = "host"
MODELS = [BoundModel, PipelinedModel]


# --- the stand-in


class Event:
    """What was done when it was recorded."""

    def __init__(self, cuda: StandIn) -> None:
        self._cuda = cuda
        self.before: set[int] = set()

    def record(self, stream: Stream) -> None:
        self.before = set(stream.before)
        self._cuda.log.append(f"record {stream}")
        self._stream = stream

    def synchronize(self) -> None:
        self._cuda.log.append("host waits")
        self._cuda.host.before |= self.before

    def __str__(self) -> str:
        return str(getattr(self, "_stream", "nothing"))


class Stream:
    """Something that does one thing after the other; the host is one, too."""

    def __init__(self, cuda: StandIn, name: str) -> None:
        self._cuda = cuda
        self._name = name
        self.before: set[int] = set()

    def wait_event(self, event: Event) -> None:
        self._cuda.log.append(f"{self} waits for {event}")
        self.before |= event.before

    def __str__(self) -> str:
        return self._name


class Runtime:
    """Stands in for the CUDA runtime; it refuses to page-lock what is larger than ``limit`` bytes."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.locked: dict[int, int] = {}
        self.unlocked: list[int] = []

    def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:  # noqa: N802  # CUDA's name
        assert flags == 1, "for every GPU"
        assert not start % mmap.PAGESIZE
        assert not nbytes % mmap.PAGESIZE
        if nbytes > self.limit:
            return 2
        assert all(start + nbytes <= other or other + size <= start for other, size in self.locked.items())
        self.locked[start] = nbytes
        return 0

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802  # CUDA's name
        self.unlocked.append(start)
        del self.locked[start]
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802  # CUDA's name
        return f"out of memory ({code})"

    def holds(self, tensor: Tensor) -> bool:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(first <= start and stop <= first + size for first, size in self.locked.items())


class StandIn:
    """Stands in for the module ``torch.cuda``."""

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.runtime = runtime or Runtime()
        self.log: list[str] = []
        self.host = self.thread = Stream(self, HOST)
        self.computing = {device: Stream(self, f"computing {device.index}") for device in GPUS}
        self.current = dict(self.computing)
        self.sides: dict[Stream, torch.device] = {}

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802  # torch's name
        stream = Stream(self, f"side {device.index}")
        self.sides[stream] = device
        return stream

    def Event(self) -> Event:  # noqa: N802  # torch's name
        return Event(self)

    def current_stream(self, device: torch.device) -> Stream:
        return self.current[device]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        device = self.sides[stream]
        before, self.current[device] = self.current[device], stream
        yield
        self.current[device] = before

    def cudart(self) -> Runtime:
        return self.runtime


class Detector(TorchDispatchMode):
    """Finds accesses to the same memory of which one writes and neither is known to come before the other.

    Whatever works on the host's memory alone is done by the host, and everything else by the devices whose memory it
    is, each on its present stream.
    """

    def __init__(self, cuda: StandIn, blocks: Sequence[tuple[Tensor, Any]]) -> None:
        super().__init__()
        self._cuda = cuda
        # By the address of a storage; it keeps none alive, so only lasting ones are here.
        self._places = {address(block): frozenset([place]) for block, place in blocks}
        self._spans = [(address(block), block.untyped_storage().nbytes()) for block, _ in blocks]
        self._accesses: list[tuple[int, int, bool]] = []
        self._held: list[Any] = []
        self.races: list[str] = []

    def _address(self, tensor: Tensor) -> int:
        """Where the lasting block begins that a tensor lies in; its own storage may be a part of that."""
        own = address(tensor)
        return next((start for start, nbytes in self._spans if start <= own < start + nbytes), own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = list(tensors_of((args, kwargs or {})))
        outputs = list(tensors_of(result))
        self._held += [*inputs, *outputs]  # so that no address is used twice
        written = {self._address(tensor) for tensor in outputs} if not func.is_view else set()
        places = frozenset().union(*(self._places.get(self._address(tensor), frozenset()) for tensor in inputs))
        for tensor in outputs:
            self._places.setdefault(self._address(tensor), places or frozenset([HOST]))
        if not func.is_view:
            between = func is torch.ops.aten.copy_.default and HOST in places and len(places) > 1
            blocks = between and True not in args[2:]
            self.access({self._address(tensor) for tensor in inputs} - written, written, places, str(func), blocks)
            if between:
                self._cuda.log.append("copy that blocks" if blocks else "copy")
        return result

    def access(self, read: set[int], written: set[int], places: frozenset[Any], what: str, blocks: bool) -> None:
        streams = [self._cuda.current[place] for place in places if place != HOST] or [self._cuda.thread]
        known = set().union(self._cuda.thread.before, *(stream.before for stream in streams))
        number = len(self._held)
        for other, where, writes in self._accesses:
            if other not in known and (where in written or (writes and where in read)):
                self.races.append(f"{what} by {', '.join(map(str, streams))}")
        self._accesses += [(number, where, False) for where in read] + [(number, where, True) for where in written]
        self._held.append(None)  # the next access has another number
        for stream in [*streams, self._cuda.thread] if blocks else streams:
            stream.before |= {number, *known}


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_of(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_of(value)
    elif isinstance(values, dict):
        yield from tensors_of(list(values.values()))


class Client:
    """Plays a ps that others push to, too: what it gives back is what it got, and one more."""

    def __init__(self, layouts: Sequence[ArenaLayout], cuda: StandIn) -> None:
        self.memory = WorkerMemory(
            *([torch.zeros(layout.size, dtype=layout.torch_dtype) for layout in layouts] for _ in range(2))
        )
        self.push_times: list[Any] = []
        self.refusing: set[int] = set()
        self.global_step = self.local_step = 0
        self._result: PushResult | None = None
        self._cuda = cuda
        self._aside = Stream(cuda, "exchange")

    def plan(self, parts: Any, pull: Any) -> list[PushTemplate]:
        return [PushTemplate(tuple(parts[0]), tuple(pull[0]), (), ())]

    def push_pull(
        self,
        plans: Sequence[PushTemplate],
        *,
        counts: bool,
        rows: None = None,
        meanwhile: Meanwhile = nothing,
        number: int | None = None,
    ) -> PushResult:
        self._cuda.log.append("push_pull")
        meanwhile()
        for part in plans[0].parts:
            if part.operation == "assign":
                self.memory.values[part.arena].copy_(self.memory.gradients[part.arena])
            else:
                self.memory.values[part.arena].add_(self.memory.gradients[part.arena])
        self.pull([plans[0].pull])
        return PushResult(int(counts), 0)

    def begin_push_pull(
        self,
        plans: Sequence[PushTemplate],
        *,
        counts: bool,
        computed_from: int,
        rows: None = None,
        number: int | None = None,
    ) -> None:
        self._aside.before |= self._cuda.host.before
        self._cuda.thread = self._aside
        self._result = self.push_pull(plans, counts=counts)
        self._cuda.thread = self._cuda.host

    def next_number(self) -> int:
        return 1

    def has_begun(self, number: int) -> bool:
        return True

    def finish_push(self) -> PushResult | None:
        result, self._result = self._result, None
        self._cuda.host.before |= self._aside.before
        return result

    def pull(self, arenas: Sequence[Sequence[int]]) -> int:
        for arena in arenas[0]:
            self.memory.values[arena].add_(1)
        return 0


class Bound:
    """A model on stand-ins for GPUs, and what its steps do."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[BoundModel],
        model: nn.Module,
        gpus: int = 1,
        make: Callable[[StandIn], Any] | None = None,
    ) -> None:
        self.cuda = StandIn()
        recorded: list[tuple[int, str]] = []
        chosen = [make(self.cuda) if make else CudaCopies(self.cuda, GPUS[:gpus])]
        monkeypatch.setattr(device_copies, "choose", lambda memories, devices: chosen.pop())
        monkeypatch.setattr(
            Tensor, "record_stream", lambda block, stream: recorded.append((address(block), str(stream)))
        )
        self.recorded = recorded
        optimizers = [optim.SGD(model.parameters(), lr=0.1)]
        arenas = plan(collect(model, optimizers), optimizers, RoundRobin().start(1), num_ps=1)
        client: Any = Client([arena.layout for arena in arenas[0]], self.cuda)
        self.memory = client.memory
        self.tensors = ReplicaTensors(model, optimizers, GPUS[:gpus])
        self.model = kind(
            ModelBinding(
                arenas=arenas,
                memories=[client.memory],
                optimizers=optimizers,
                tensors=self.tensors,
                reduction=ReduceOp.MEAN,
                client=client,
                first_rows={},
            )
        )
        self.model.assign()
        self.model.bind()
        self._module = model
        self.detector = Detector(self.cuda, list(self._blocks()))
        self.cuda.log.clear()

    def step(self) -> list[str]:
        """Compute and step; what was asked for meanwhile."""
        self.cuda.log.clear()
        with self.detector:
            for index in range(len(self.tensors.devices)):
                self.tensors.activate(index)
                self._compute(index)
            self.tensors.activate(0)
            self.cuda.log.clear()
            self.model.step()
        return list(self.cuda.log)

    def state(self) -> list[Tensor]:
        """The first replica's parameters and buffers."""
        return [*self._module.parameters(), *self._module.buffers()]

    def _compute(self, replica: int) -> None:
        """What forward and backward do to memory: read all values, write all gradients and buffers."""
        for parameter in self._module.parameters():
            if not parameter.requires_grad:
                continue
            gradient = parameter.detach() * (1 + replica)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.copy_(gradient)
        for buffer in self._module.buffers():
            buffer.add_(1 + replica)

    def _blocks(self) -> Iterator[tuple[Tensor, Any]]:
        """All memory that lasts, and where it is."""
        for block in [*self.memory.values, *self.memory.gradients]:
            yield block, HOST
        for arena in (arena for arenas in self.model._arenas for arena in arenas):
            for name in ("_reached", "_known"):
                if hasattr(arena, name):
                    yield getattr(arena, name), HOST
            for name in ("_replica_values", "_replica_gradients"):
                for index, block in enumerate(getattr(arena, name, [])):
                    if block is not arena.values:
                        yield block, GPUS[index]


class Small(nn.Module):
    """Parameters only: one arena."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Normal(nn.Module):
    """Parameters, running statistics of floats, a count of integers, and a parameter of another dtype: four arenas."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.fine = nn.Parameter(torch.ones(3, dtype=torch.float64))


class Counts(nn.Module):
    """Nothing but a count of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("count", torch.ones(2, dtype=torch.int64))


# --- what a step asks for


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_waits_once_for_what_it_pushes_and_never_for_values(
    kind: type[BoundModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = Bound(monkeypatch, kind, Small())
    aside = [
        "record computing 0", "side 0 waits for computing 0", "copy", "record side 0", "computing 0 waits for side 0"
    ]  # fmt: skip
    bound.step()
    pushed, pulled = [*aside, "host waits", "push_pull"], aside
    for _ in range(2):
        assert bound.step() == (pushed + pulled if kind is BoundModel else pulled + pushed)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_the_host_waits_once_for_each_gpu_whatever_the_number_of_arenas(
    kind: type[BoundModel], gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = Bound(monkeypatch, kind, Normal(), gpus)
    assert len(bound.memory.values) == 4
    for _ in range(3):
        log = bound.step()
        assert log.count("host waits") == gpus
        assert "copy that blocks" not in log


def test_a_program_may_compute_on_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Bound(monkeypatch, BoundModel, Small())
    bound.cuda.current[GPUS[0]] = Stream(bound.cuda, "another")
    assert bound.step()[:2] == ["record another", "side 0 waits for another"]


# --- races


@pytest.mark.parametrize("model", [Small, Normal, Counts])
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_read_while_it_is_written(
    kind: type[BoundModel], gpus: int, model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = Bound(monkeypatch, kind, model(), gpus)
    for _ in range(4):
        bound.step()
    with bound.detector:
        bound.model.refresh()
        bound.model.assign()
    bound.step()
    assert bound.detector.races == []


def nothing(*_: object) -> None:
    """In the place of a wait."""


def alone(side: Any, _: object) -> None:
    """Copies that do not wait for other devices' ones."""
    BEGIN(side, [])


BEGIN = device_copies._Side.begin


@pytest.mark.parametrize(
    ("model", "owner", "name", "broken"),
    [
        (Normal, CudaCopies, "finish", nothing),
        (Normal, Stream, "wait_event", nothing),
        (Normal, device_copies._Side, "end", nothing),
        (Counts, device_copies._Side, "begin", alone),
    ],
    ids=["the host does not wait", "no stream waits", "computing does not wait", "copies do not wait for others"],
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_wait_that_is_missing_is_found(
    kind: type[BoundModel],
    model: Callable[[], nn.Module],
    owner: type,
    name: str,
    broken: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail."""
    bound = Bound(monkeypatch, kind, model(), 2)
    monkeypatch.setattr(owner, name, broken)
    for _ in range(4):
        bound.step()
    assert bound.detector.races


# --- values


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_pushed_and_pulled_is_what_plain_copies_bring(
    kind: type[BoundModel], gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for make in (lambda cuda: CudaCopies(cuda, GPUS[:gpus]), lambda _: HostCopies()):
        torch.manual_seed(0)
        bound = Bound(monkeypatch, kind, Normal(), gpus, make)
        for _ in range(3):
            bound.step()
        results.append([*bound.memory.values, *bound.memory.gradients, *bound.state()])
    assert all(map(torch.equal, *results))
    assert all(tensor.any() for tensor in results[0])


# --- memory


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_are_not_given_to_others_while_they_are_copied(
    kind: type[BoundModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = Bound(monkeypatch, kind, Small(), 2)
    (arena,) = bound.model._arenas[0]
    expected = {
        (address(block), f"side {gpu}")
        for blocks in (arena._replica_values, arena._replica_gradients)
        for gpu, block in enumerate(blocks)
    }
    assert set(bound.recorded) == expected
    assert len(expected) == 4


@pytest.mark.parametrize("kind", MODELS)
def test_memory_that_steps_copy_is_page_locked_until_the_model_is_gone(
    kind: type[BoundModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = Bound(monkeypatch, kind, Normal())
    runtime = bound.cuda.runtime
    held = [*bound.memory.values, *bound.memory.gradients]
    locked = dict(runtime.locked)
    assert all(map(runtime.holds, held))
    del bound
    gc.collect()
    assert sorted(runtime.unlocked) == sorted(locked)
    assert not runtime.locked


def test_a_file_that_a_ps_maps_is_page_locked_where_it_lies() -> None:
    """Arenas share pages of it, and CUDA page-locks none twice."""
    data = torch.frombuffer(mmap.mmap(-1, 5 * mmap.PAGESIZE), dtype=torch.uint8)
    cuda = StandIn()
    copies = CudaCopies(cuda, GPUS[:1])
    page = mmap.PAGESIZE
    spans = [(0, 100), (128, page + 8), (2 * page, 2 * page + 1), (3, 3), (4 * page - 1, 4 * page)]
    copies.lock([data[start:stop] for start, stop in spans])
    assert cuda.runtime.locked == {
        data.data_ptr(): 2 * page, data.data_ptr() + 2 * page: page, data.data_ptr() + 3 * page: page
    }  # fmt: skip
    del copies
    assert not cuda.runtime.locked


def test_memory_that_cannot_be_page_locked_is_copied_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    cuda = StandIn(Runtime(limit=mmap.PAGESIZE))
    data = torch.frombuffer(mmap.mmap(-1, 8 * mmap.PAGESIZE), dtype=torch.uint8)
    small, large = data[:1], data[2 * mmap.PAGESIZE : 5 * mmap.PAGESIZE]
    copies = CudaCopies(cuda, GPUS[:1])
    copies.lock([small, large])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "could not page-lock" in record.message
    assert f"{3 * mmap.PAGESIZE} bytes: out of memory (2)" in record.message
    assert list(cuda.runtime.locked) == [data.data_ptr()]
    with copies.aside():
        copies.copy(large, torch.ones_like(large))
    copies.finish()
    assert large.all()
    del copies
    assert cuda.runtime.unlocked == [data.data_ptr()]


def test_copies_are_over_before_their_memory_is_unlocked() -> None:
    cuda = StandIn()
    copies = CudaCopies(cuda, GPUS[:1])
    copies.lock([torch.zeros(1)])
    assert "host waits" not in cuda.log
    del copies
    assert cuda.log[-1:] == ["host waits"]


def test_a_forked_child_leaves_the_memory_of_its_parent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandIn()
    copies = CudaCopies(cuda, GPUS[:1])
    copies.lock([torch.zeros(1)])
    monkeypatch.setattr(device_copies.os, "getpid", lambda: -1)
    del copies
    assert cuda.runtime.unlocked == []


def test_a_gpu_that_has_failed_keeps_nobody_from_ending() -> None:
    cuda = StandIn()
    copies = CudaCopies(cuda, GPUS[:1])
    copies.lock([torch.zeros(1)])

    def fail(_: Event) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Event, "synchronize", fail)
        del copies
    assert len(cuda.runtime.unlocked) == 1


# --- the choice


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cuda:0"], ["meta"]])
def test_copies_of_host_memory_are_plain(devices: list[str]) -> None:
    home = WorkerMemory([torch.zeros(1)], [torch.zeros(1)])
    assert isinstance(choose([home], list(map(torch.device, devices))), HostCopies)


def test_copies_between_gpus_are_plain() -> None:
    home = WorkerMemory([torch.zeros(1, device="meta")], [torch.zeros(1, device="meta")])
    assert isinstance(choose([home], [torch.device("cuda", 0)]), HostCopies)


def test_replicas_that_are_all_on_gpus_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandIn()
    monkeypatch.setattr(device_copies.torch, "cuda", cuda)
    home = WorkerMemory([torch.zeros(1)], [torch.zeros(1)])
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0)]
    assert isinstance(choose([home, WorkerMemory([], [])], devices), CudaCopies)
    assert list(cuda.sides.values()) == devices[:2]
