"""Copies between the memory of the lanes and the blocks of replicas that compute elsewhere.

Rules
    * A copy is made inside of `DeviceCopies.aside`. It comes after whatever its devices were to compute before, and
      what they compute later comes after it. Blocks of copies come one after the other, whatever their devices.
    * The host reads what was copied to it, and writes over what was copied from it, after `DeviceCopies.finish` only.
      A step calls that once: between the copies of what it pushes, and the push. The copies of the values that the
      step before has pulled are over then, too, and so the pull may overwrite them.
    * On GPUs all copies of a device are on one stream of their own, from and to memory that is page-locked where it
      lies. What a lane has mapped is not copied once more to get there.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from paramserver.transport.lane import WorkerMemory

logger = logging.getLogger(__name__)

PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every GPU of the process."""


class DeviceCopies(abc.ABC):
    """How one worker copies between the lanes' memory and the blocks of its replicas. Not thread-safe."""

    @abc.abstractmethod
    def lock(self, memory: Iterable[torch.Tensor]) -> None:
        """Page-lock memory of the lanes that every step copies, for as long as this object lives."""

    @abc.abstractmethod
    def use(self, block: torch.Tensor, device: torch.device) -> None:
        """Keep a replica's block, on its device, from being given to others while copies of it are under way."""

    @abc.abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """Where copies, and what is computed for them alone, are made. Does not block."""

    @abc.abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy what lies in one piece, inside of `aside`. May return before it is done."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Wait until all copies are done."""


class HostCopies(DeviceCopies):
    """Every copy is done when it returns."""

    def lock(self, memory: Iterable[torch.Tensor]) -> None:
        """There is nothing to lock for."""

    def use(self, block: torch.Tensor, device: torch.device) -> None:
        """Nothing is ever under way."""

    def aside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def finish(self) -> None:
        """Nothing is ever under way."""


class RecordedEvent(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self, stream: Any) -> None:
        """It has come when the stream has done all that it was given so far."""

    def synchronize(self) -> None:
        """Wait until it has come; not at all if it was never recorded."""


class SideStream(Protocol):
    """What is used of ``torch.cuda.Stream``."""

    def wait_event(self, event: Any) -> None:
        """Whatever the stream is given from now on comes after the event."""


class Cuda(Protocol):
    """What is used of the module ``torch.cuda``."""

    def Stream(self, device: torch.device) -> SideStream: ...  # noqa: N802  # torch's name

    def Event(self) -> RecordedEvent: ...  # noqa: N802  # torch's name

    def current_stream(self, device: torch.device) -> SideStream: ...

    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...

    def cudart(self) -> Any: ...


class CudaCopies(DeviceCopies):
    """Copies on a stream of their own for each GPU. No replica computes in the lanes' memory.

    Args:
        cuda: The module ``torch.cuda``, or what stands in for it.
        devices: Where replicas compute.
    """

    def __init__(self, cuda: Cuda, devices: Iterable[torch.device]) -> None:
        self._cuda = cuda
        self._sides = [_Side(cuda, device) for device in dict.fromkeys(devices)]

    def lock(self, memory: Iterable[torch.Tensor]) -> None:
        held = list(memory)
        spans, failure = _page_locked(self._cuda.cudart(), _page_spans(held))
        # It must not be given back while it is locked, or copied.
        weakref.finalize(self, _unlock, self._cuda, os.getpid(), self._sides, spans, held)
        if failure:
            _forget_error(self._sides[0].device)
            logger.warning(
                "copies to and from %s are slower than they could be: CUDA could not page-lock the memory that the "
                "parameter servers' values and gradients lie in (%s)",
                ", ".join(str(side.device) for side in self._sides),
                failure,
            )

    def use(self, block: torch.Tensor, device: torch.device) -> None:
        for side in self._sides:
            if side.device == device:
                block.record_stream(side.stream)  # type: ignore[arg-type]  # or what stands in for it

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for side in self._sides:
                side.begin(self._sides)
                stack.callback(side.end)
            for side in self._sides:
                stack.enter_context(self._cuda.stream(side.stream))
            yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def finish(self) -> None:
        for side in self._sides:
            side.done.synchronize()


class _Side:
    """The stream beside the one that a device computes on.

    Attributes:
        device: The device.
        stream: The stream.
        done: All copies so far.
    """

    def __init__(self, cuda: Cuda, device: torch.device) -> None:
        self.device = device
        self.stream = cuda.Stream(device=device)
        self.done = cuda.Event()
        self._cuda = cuda
        self._computed = cuda.Event()
        self._computing = self.stream

    def begin(self, sides: Sequence[_Side]) -> None:
        """Copies come after what the device is to compute by now, and after all other devices' copies so far."""
        self._computing = self._cuda.current_stream(self.device)  # a program may compute on any
        self._computed.record(self._computing)
        self.stream.wait_event(self._computed)
        for other in sides:
            if other is not self:
                self.stream.wait_event(other.done)

    def end(self) -> None:
        """What the device computes from now on comes after the copies."""
        self.done.record(self.stream)
        self._computing.wait_event(self.done)


def choose(memories: Sequence[WorkerMemory], devices: Sequence[torch.device]) -> DeviceCopies:
    """The way to copy between lanes' memory and replicas on ``devices``.

    The GPUs' own only where nobody computes in the memory of the lanes: copies that are under way would meet that.
    """
    homes = {values.device.type for memory in memories for values in memory.values}
    if homes == {"cpu"} and {device.type for device in devices} == {"cuda"}:
        return CudaCopies(torch.cuda, devices)
    return HostCopies()


def _page_spans(memory: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """The pages that tensors lie on, as ``(start, stop)`` addresses. No page is in two of them: CUDA refuses that."""
    page = mmap.PAGESIZE
    rounded = sorted(
        (tensor.data_ptr() // page * page, -(-(tensor.data_ptr() + tensor.nbytes) // page) * page)
        for tensor in memory
        if tensor.nbytes
    )
    spans: list[tuple[int, int]] = []
    for start, stop in rounded:
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return spans


def _page_locked(cudart: Any, spans: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], str]:
    """Page-lock spans one by one: those that could be, and why the first one that could not be was not, if any."""
    locked: list[tuple[int, int]] = []
    for start, stop in spans:
        code = cudart.cudaHostRegister(start, stop - start, PORTABLE)
        if int(code):
            return locked, f"{stop - start} bytes: {cudart.cudaGetErrorString(code)}"
        locked.append((start, stop))
    return locked, ""


def _unlock(
    cuda: Cuda, pid: int, sides: Sequence[_Side], spans: Sequence[tuple[int, int]], held: Sequence[torch.Tensor]
) -> None:
    """Undo `_page_locked`; ``held`` may be given back when this has returned."""
    if os.getpid() != pid:
        return  # a forked child, such as a DataLoader's, has no part in it
    with contextlib.suppress(RuntimeError):  # a GPU that has failed copies nothing any more, and has said so
        for side in sides:
            side.done.synchronize()
    for start, _ in spans:
        cuda.cudart().cudaHostUnregister(start)


def _forget_error(device: torch.device) -> None:
    """The CUDA runtime keeps an error for whoever looks next, who would take it for their own."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
