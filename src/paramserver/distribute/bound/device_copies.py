"""Copies between the memory of the lanes and the blocks of replicas that compute elsewhere.

Rules
    * A copy is made inside of `DeviceCopies.aside`. It runs after all earlier work of its devices, and their later work
      runs after it. Blocks of copies run one after the other, on all devices.
    * The host reads the target of a copy, and overwrites the source of one, only after `DeviceCopies.finish`. A step
      calls that once, between the copies of the data that it pushes and the push. The copies of the values that the
      previous step pulled are finished then, too, so the pull may overwrite them.
    * On GPUs, all copies of a device run on one stream of their own. The lanes' memory is page-locked where it is, so
      memory that a lane has mapped needs no second copy.
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
"""cudaHostRegisterPortable: the memory is page-locked for every GPU of the process."""


class DeviceCopies(abc.ABC):
    """The way one worker copies between the lanes' memory and the blocks of its replicas. Not thread-safe."""

    @abc.abstractmethod
    def lock(self, memory: Iterable[torch.Tensor]) -> None:
        """Page-lock the lanes' memory that every step copies, for the lifetime of this object."""

    @abc.abstractmethod
    def use(self, block: torch.Tensor, device: torch.device) -> None:
        """Protect a replica's block on its device from reuse while copies of it are under way."""

    @abc.abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """Return a context for copies, and for computations that only they need. Does not block."""

    @abc.abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a contiguous tensor, inside of `aside`. May return before the copy is done."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Wait until all copies are done."""


class HostCopies(DeviceCopies):
    """Copies that are done when the call returns."""

    def lock(self, memory: Iterable[torch.Tensor]) -> None:
        """Do nothing: host copies need no page-locked memory."""

    def use(self, block: torch.Tensor, device: torch.device) -> None:
        """Do nothing: no copy is ever under way."""

    def aside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def finish(self) -> None:
        """Do nothing: no copy is ever under way."""


class RecordedEvent(Protocol):
    """The part of ``torch.cuda.Event`` that is used here."""

    def record(self, stream: Any) -> None:
        """Complete the event when the stream has done all work it was given so far."""

    def synchronize(self) -> None:
        """Wait until the event is complete; return at once if it was never recorded."""


class SideStream(Protocol):
    """The part of ``torch.cuda.Stream`` that is used here."""

    def wait_event(self, event: Any) -> None:
        """Run all work that the stream is given from now on after the event."""


class Cuda(Protocol):
    """The part of the module ``torch.cuda`` that is used here."""

    def Stream(self, device: torch.device) -> SideStream: ...  # noqa: N802  # torch's name

    def Event(self) -> RecordedEvent: ...  # noqa: N802  # torch's name

    def current_stream(self, device: torch.device) -> SideStream: ...

    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...

    def cudart(self) -> Any: ...


class CudaCopies(DeviceCopies):
    """Copies on a separate stream for each GPU. No replica computes in the lanes' memory.

    Args:
        cuda: The module ``torch.cuda``, or a stand-in for it.
        devices: The devices of the replicas.
    """

    def __init__(self, cuda: Cuda, devices: Iterable[torch.device]) -> None:
        self._cuda = cuda
        self._sides = [_Side(cuda, device) for device in dict.fromkeys(devices)]

    def lock(self, memory: Iterable[torch.Tensor]) -> None:
        held = list(memory)
        spans, failure = _page_locked(self._cuda.cudart(), _page_spans(held))
        # The memory must not be freed while it is locked, or while a copy of it runs.
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
                block.record_stream(side.stream)  # type: ignore[arg-type]  # or a stand-in for it

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
        done: The event that completes with all copies so far.
    """

    def __init__(self, cuda: Cuda, device: torch.device) -> None:
        self.device = device
        self.stream = cuda.Stream(device=device)
        self.done = cuda.Event()
        self._cuda = cuda
        self._computed = cuda.Event()
        self._computing = self.stream

    def begin(self, sides: Sequence[_Side]) -> None:
        """Order the next copies after the device's present work, and after all other devices' copies so far."""
        self._computing = self._cuda.current_stream(self.device)  # a program may choose any stream
        self._computed.record(self._computing)
        self.stream.wait_event(self._computed)
        for other in sides:
            if other is not self:
                self.stream.wait_event(other.done)

    def end(self) -> None:
        """Order the device's later work after the copies."""
        self.done.record(self.stream)
        self._computing.wait_event(self.done)


def choose(memories: Sequence[WorkerMemory], devices: Sequence[torch.device]) -> DeviceCopies:
    """Return the way to copy between the lanes' memory and replicas on ``devices``.

    `CudaCopies` only if all replicas are on GPUs: a replica that computes in the lanes' memory would collide with
    copies that are under way.
    """
    homes = {values.device.type for memory in memories for values in memory.values}
    if homes == {"cpu"} and {device.type for device in devices} == {"cuda"}:
        return CudaCopies(torch.cuda, devices)
    return HostCopies()


def _page_spans(memory: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the pages of tensors as ``(start, stop)`` addresses, disjoint because CUDA refuses a page twice."""
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
    """Page-lock spans one by one until one fails; return the locked spans, and the failure or an empty text."""
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
    """Undo `_page_locked`. The memory of ``held`` may be freed after this call."""
    if os.getpid() != pid:
        return  # a forked child, such as a DataLoader's, does not own the locks
    with contextlib.suppress(RuntimeError):  # a failed GPU copies nothing any more, and has reported its error
        for side in sides:
            side.done.synchronize()
    for start, _ in spans:
        cuda.cudart().cudaHostUnregister(start)


def _forget_error(device: torch.device) -> None:
    """Take the error out of the CUDA runtime, where the next unrelated call would otherwise raise it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
