"""The contexts of each thread: the strategy in effect, and the replica or the update that the thread is in.

Rules
    * A thread is in the default context, in the *cross-replica* context of a strategy (its scope), or in the context
      of one *replica*. A new thread starts in the default context.
    * An *update* belongs to the cross-replica context and has a device.
    * Contexts of different strategies do not mix.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from paramserver.distribute.core.worker import Worker

W = TypeVar("W", bound=Worker)


class Replica(Protocol):
    """The part of a replica that contexts and their users need; see `ReplicaContext`."""

    strategy: Worker
    replica_id_in_sync_group: Any
    is_done: bool

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of replicas of the worker."""

    @property
    def index(self) -> int:
        """The index of this replica among those of the worker."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of this replica."""

    def merge_call(
        self, fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function once for all replicas."""


class Frame(NamedTuple):
    """One context that a thread has entered.

    Attributes:
        strategy: The strategy of the context.
        replica: The replica; None in the cross-replica context.
        update_device: The device of the variable that is being updated; None outside of updates.
    """

    strategy: Worker
    replica: Replica | None = None
    update_device: str | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.has_base = False  # whether `set_base` rather than a `with` put the first frame there


_thread = _Thread()


def current() -> Frame | None:
    """Return the innermost context of this thread; None for the default context."""
    return _thread.frames[-1] if _thread.frames else None


@contextlib.contextmanager
def entered(frame: Frame) -> Iterator[None]:
    """Enter a context for a ``with`` block.

    Raises:
        RuntimeError: On leaving, if contexts are not left in the opposite order of entering. Contexts that were entered
            inside this one are left with it, so that the thread is back where it was before.
    """
    frames = _thread.frames
    frames.append(frame)
    try:
        yield
    finally:
        _leave(frames, frame)


def _leave(frames: list[Frame], frame: Frame) -> None:
    depth = next((at for at, each in enumerate(frames) if each is frame), None)
    if depth is None:
        return  # left together with an outer context, which has raised the error
    is_innermost = depth == len(frames) - 1
    del frames[depth:]
    if not is_innermost:
        raise RuntimeError(
            f"scope nesting error: the scope of {frame.strategy!r} is left before one that was entered inside it; "
            "leave them in the opposite order"
        )


class Scope(contextlib.ContextDecorator, contextlib.AbstractContextManager[W]):
    """The cross-replica context of a strategy. One object can be entered several times, also inside itself.

    Args:
        strategy: The strategy of the scope.
    """

    def __init__(self, strategy: W) -> None:
        self._strategy = strategy
        self._entered = _Entered()

    def __enter__(self) -> W:
        """Enter the scope on this thread.

        Raises:
            RuntimeError: Inside the scope of another strategy, or inside a replica.
        """
        _check_cross_replica(self._strategy, "scope()")
        context = entered(Frame(self._strategy))
        context.__enter__()
        self._entered.contexts.append(context)
        return self._strategy

    def __exit__(self, *error: Any) -> None:
        """Leave the context that was entered last."""
        self._entered.contexts.pop().__exit__(*error)


def scope(strategy: W) -> Scope[W]:
    """Return the cross-replica context of a strategy, to be entered with ``with``."""
    return Scope(strategy)


class _Entered(threading.local):
    """The contexts that each thread has entered by one scope."""

    def __init__(self) -> None:
        self.contexts: list[contextlib.AbstractContextManager[None]] = []


class NoScope(contextlib.ContextDecorator, contextlib.AbstractContextManager[W]):
    """The scope of the default strategy. It changes nothing: that strategy is in effect where no other one is.

    Args:
        strategy: The default strategy.
    """

    def __init__(self, strategy: W) -> None:
        self._strategy = strategy

    def __enter__(self) -> W:
        """Check that no other strategy is in effect.

        Raises:
            RuntimeError: Inside the scope of a strategy.
        """
        frame = current()
        if frame is not None:
            _check_same(self._strategy, frame, "scope()")
        return self._strategy

    def __exit__(self, *error: object) -> None:
        """Do nothing: no context was entered."""


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Put this thread into the default context for a ``with`` block, for work that its scope must not affect."""
    around, has_base = _thread.frames, _thread.has_base
    _thread.frames, _thread.has_base = [], False
    try:
        yield
    finally:
        _thread.frames, _thread.has_base = around, has_base


@contextlib.contextmanager
def cross_replica(strategy: Worker, call: str) -> Iterator[None]:
    """Enter the cross-replica context for a call that needs it but may be made outside of all scopes.

    Args:
        strategy: The strategy that the call is made on.
        call: The name of the call, for messages.

    Raises:
        RuntimeError: Inside a replica, or inside the scope of another strategy.
    """
    _check_cross_replica(strategy, call)
    if _thread.frames:
        yield
    else:
        with entered(Frame(strategy)):
            yield


def check_scope(strategy: Worker, call: str) -> None:
    """Raise RuntimeError unless this thread is in a context of ``strategy``."""
    frame = current()
    if frame is None:
        raise RuntimeError(f"{call}: Need to be inside `with strategy.scope():` of {strategy!r}")
    _check_same(strategy, frame, call)


def set_base(strategy: Worker | None) -> None:
    """Enter a strategy's scope until the next call; None leaves it.

    Raises:
        RuntimeError: Inside a ``with`` block of a scope.
    """
    if len(_thread.frames) > _thread.has_base:
        raise RuntimeError(
            "set_strategy: this thread is inside a `with strategy.scope():`; leave it first, or nest scopes instead"
        )
    _thread.frames[:] = [Frame(strategy)] if strategy is not None else []
    _thread.has_base = strategy is not None


def current_replica() -> Replica | None:
    """Return the replica that this thread is in; None in cross-replica and in default context."""
    frame = current()
    return frame.replica if frame else None


def in_cross_replica_context() -> bool:
    """Return whether this thread is in the cross-replica context of a strategy."""
    frame = current()
    return frame is not None and frame.replica is None


def get_update_replica_id() -> str | None:
    """Return the device of the variable that this thread is updating; None outside of updates."""
    frame = current()
    return frame.update_device if frame else None


def _check_cross_replica(strategy: Worker, call: str) -> None:
    frame = current()
    if frame is None:
        return
    _check_same(strategy, frame, call)
    if frame.replica is not None:
        raise RuntimeError(
            f"{call} requires being in cross-replica context, and was called inside replica "
            f"{frame.replica.replica_id_in_sync_group}; use get_replica_context().merge_call()"
        )


def _check_same(strategy: Worker, frame: Frame, call: str) -> None:
    if frame.strategy is not strategy:
        raise RuntimeError(
            f"Mixing different strategies: {call} of {strategy!r} was called inside the scope of {frame.strategy!r}; "
            "leave that first"
        )
