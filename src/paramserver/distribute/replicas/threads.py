"""Runs a function on several replicas in lock step: each has a thread of its own, and one of them runs at a time.

Rules
    * The replicas take turns in the order of their ids. A turn ends when the function returns or reaches a
      `ReplicaContext.merge_call`. When all replicas have reached one, the calling thread makes the merge.
    * So no two replicas run code between merges at the same time, and the same program always runs in the same order.
    * An exception in a replica or in a merge ends all replicas: threads that wait in a merge are unwound, and the call
      raises the exception after every thread has ended.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from paramserver.distribute.core import context
from paramserver.distribute.core.context import Frame
from paramserver.distribute.core.devices import default_device
from paramserver.distribute.core.values import regroup, select_replica
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.replicas.context import ReplicaContext


def call_for_each_replica(
    strategy: Worker,
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    activate: Callable[[int], None],
) -> Any:
    """Call ``fn`` on every replica of a strategy, and regroup the results. Blocks.

    Args:
        strategy: The strategy, in cross-replica context.
        fn: The function.
        args: Its arguments; distributed values among them are taken apart.
        kwargs: Its arguments by name, taken apart likewise.
        activate: Called before each turn with the id of the replica, and before each merge with 0.

    Raises:
        RuntimeError: If the replicas make different numbers of merge calls.
        Exception: Any exception of ``fn``, or of a function that it merges with.
    """
    count = strategy.num_replicas_in_sync
    inputs = [(select_replica(index, tuple(args)), select_replica(index, dict(kwargs))) for index in range(count)]
    if count == 1:
        replica = ReplicaContext(strategy, 0)
        with context.entered(Frame(strategy, replica)):
            return fn(*inputs[0][0], **inputs[0][1])
    replicas = [_Replica(strategy, index, partial(fn, *own, **named)) for index, (own, named) in enumerate(inputs)]
    with _leaving_first(activate), _ended(replicas):
        while True:
            for index, replica in enumerate(replicas):
                activate(index)
                replica.take_turn()
            activate(0)
            if all(replica.is_done for replica in replicas):
                return regroup([replica.result for replica in replicas])
            _merge(strategy, replicas)


class _MergeCall(NamedTuple):
    """The call that a replica asks for on behalf of all replicas."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Ended(BaseException):
    """Unwinds a replica that waits in a merge that will not happen. Not an Exception, so that programs let it pass."""


class _Replica(ReplicaContext):
    """A replica and its thread. The calling thread uses the public names; the replica's own thread runs `_merge`."""

    def __init__(self, strategy: Worker, index: int, body: Callable[[], Any]) -> None:
        super().__init__(strategy, index)
        self.result: Any = None
        self.merge_call_made: _MergeCall | None = None
        self.is_done = False
        self._merged: Any = None
        self._error: BaseException | None = None
        self._is_ending = False
        # The replica's thread runs between `_turn` and `_paused`, the calling thread at all other times.
        self._turn = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        surroundings, inherited = contextvars.copy_context(), _TorchState()
        self._thread = threading.Thread(
            target=lambda: surroundings.run(self._run, body, inherited), name=f"replica {index}", daemon=True
        )

    def take_turn(self) -> None:
        """Let the replica run until it is done or reaches a merge call. Raises any exception of the replica."""
        self.merge_call_made = None
        if not self.is_done:
            self._go_on()
            self._paused.acquire()
        if self._error is not None:
            raise self._error

    def give(self, merged: Any) -> None:
        """Provide the replica's component of a merge's result, for its next turn."""
        self._merged = merged

    def end(self) -> None:
        """Unwind the replica if it has not ended, and wait for its thread. Idempotent."""
        if self._thread.ident is not None:
            self._is_ending = True
            self._turn.release()
            self._thread.join()
        self._error = None  # its traceback refers to this object: a reference cycle
        self.result = None  # its graph may refer to this object, for the backward of a collective: another cycle

    def _go_on(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()

    def _run(self, body: Callable[[], Any], inherited: _TorchState) -> None:
        try:
            with inherited.entered(), context.entered(Frame(self.strategy, self)):
                self.result = body()
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001  # `take_turn` raises it on the calling thread
            self._error = error
        finally:
            self.is_done = True
            self._paused.release()

    def _merge(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.merge_call_made = _MergeCall(fn, args, kwargs)
        if not self._is_ending:
            self._paused.release()
            self._turn.acquire()
        if self._is_ending:
            raise _Ended
        merged, self._merged = self._merged, None
        return merged


class _TorchState:
    """The state that torch keeps for each thread, which a replica inherits from the calling thread."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._device = default_device()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the same state on another thread."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            if default_device() != self._device:
                stack.enter_context(self._device)
            yield


def _merge(strategy: Worker, replicas: Sequence[_Replica]) -> None:
    calls = [replica.merge_call_made for replica in replicas]
    if any(call is None for call in calls):
        done = [str(index) for index, call in enumerate(calls) if call is None]
        raise RuntimeError(
            "run: the replicas made a different number of replica_context().merge_call() calls: "
            f"{', '.join(done)} had returned when the others came to one; every replica must make the same calls "
            "(also optimizer.step(), the assignment of an aggregated variable, all_reduce, all_gather and backward "
            "through these two are such calls)"
        )
    first = calls[0]
    assert first is not None  # noqa: S101  # just checked
    args, kwargs = regroup([(call.args, call.kwargs) for call in calls if call is not None])
    with context.entered(Frame(strategy)):
        merged = first.fn(strategy, *args, **kwargs)
    for index, replica in enumerate(replicas):
        replica.give(select_replica(index, merged))


@contextlib.contextmanager
def _ended(replicas: Sequence[_Replica]) -> Iterator[None]:
    try:
        yield
    finally:
        for replica in replicas:
            replica.end()


@contextlib.contextmanager
def _leaving_first(activate: Callable[[int], None]) -> Iterator[None]:
    """Activate the first replica after an exception, so that the program finds its tensors in the model."""
    try:
        yield
    except BaseException:
        activate(0)
        raise
