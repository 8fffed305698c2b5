"""Hooks: a user's own code at fixed moments of a training session, and the order in which it is called.

Rules:

1. ``begin`` of all hooks -> the session is created -> ``after_create_session`` of all -> [``before_run`` of
   all -> one step -> ``after_run`` of all] repeated -> ``end`` of all.
2. While the chief, whose own input is at its end, waits for the other workers, ``while_waiting`` of all is called about
   every second: what it does for all workers goes on.
3. ``end`` is called after a clean stop only: a hook asked for it, the session ends by itself, or the input is
   at its end (StopIteration). After any other exception it is not called: what a hook writes at the end would
   look like a result.
4. Every hook sees a step whole: a stop that one hook asks for takes effect after all have seen the step.
5. No step is made after a stop was asked for.
6. What a hook wraps a step in (`RunContext.wrap_step`) is entered after all ``before_run``, in the order of the hooks,
   and left before the first ``after_run``, also when the step fails.
7. The chief's own hooks come before the user's, the user's before those that may end the run on a bad loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from paramserver.distribute.bound.step_times import StepTimes


class TrainingSession(Protocol):
    """What a hook may ask of the running training."""

    @property
    def global_step(self) -> int:
        """The last known updates of the model, those of other workers included. Does not block."""

    @property
    def is_chief(self) -> bool:
        """Whether this task checkpoints and writes summaries."""

    @property
    def task(self) -> str:
        """This task's name, such as ``worker:1``."""

    @property
    def model_dir(self) -> str:
        """Where checkpoints and summaries lie."""

    def read_global_step(self) -> int:
        """Ask for the updates of the model by now. Blocks for a round trip.

        Raises:
            UnavailableError: If the ps task cannot be reached.
        """

    def refresh(self) -> int:
        """Bring the model's values up to date with the ps tasks', as every step does; the global step. Blocks.

        Raises:
            UnavailableError: If a ps task cannot be reached.
        """

    def values(self) -> dict[str, torch.Tensor]:
        """The values of the model by name, as checkpoints have them. Blocks where it has tables."""

    def save(self) -> str:
        """Write a checkpoint and return its path. Blocks until it is whole.

        Raises:
            CheckpointError: If it cannot be written.
            UnavailableError: If a ps task cannot be reached.
        """

    def statistics(self) -> StepTimes:
        """Where the time of this task's steps has gone. Does not block."""

    def should_stop(self) -> bool:
        """Whether the session ends by itself, because the run is over or `max_steps` is reached."""


SessionT = TypeVar("SessionT", bound=TrainingSession)
T = TypeVar("T")


class RunValues(NamedTuple):
    """What one step gave. A named tuple, because one is made every step."""

    loss: torch.Tensor | float
    """The loss of this worker's batch, one element. Read with ``float()``, which waits for the device."""
    global_step: int
    """The global step when this step's update was applied."""
    staleness: int
    """The updates of others between this step's pull and its push."""


class RunContext:
    """What the hooks of one session share: the session, and the wish to stop."""

    def __init__(self, session: TrainingSession) -> None:
        self.session = session
        self._stop_requested = False
        self._wraps: list[contextlib.AbstractContextManager[object]] = []

    def __repr__(self) -> str:
        return f"RunContext(task={self.session.task!r}, stop_requested={self._stop_requested})"

    @property
    def stop_requested(self) -> bool:
        """Whether a hook has asked for the end of the session."""
        return self._stop_requested

    def request_stop(self) -> None:
        """End the session cleanly once all hooks have seen this step. Idempotent."""
        self._stop_requested = True

    def wrap_step(self, manager: contextlib.AbstractContextManager[object]) -> None:
        """Enter a context manager around the coming step, and that one alone. For ``before_run``.

        A hook that wants more of a step than its values, such as a profile of it, gets it this way.
        """
        self._wraps.append(manager)

    def make(self, step: Callable[[], RunValues]) -> RunValues:
        """Make a step inside what it is wrapped in."""
        if not self._wraps:
            return step()
        wraps, self._wraps = self._wraps, []
        with contextlib.ExitStack() as stack:
            for manager in wraps:
                stack.enter_context(manager)
            return step()


class TrainingHook:
    """Code that is called at fixed moments of a session. Override what you need; the rest does nothing.

    All methods are called on the thread that trains. One object serves one session at a time. An exception
    from any of them ends the training, ``end`` of the other hooks is then not called.
    """

    def begin(self) -> None:
        """Before the session is created: once, also when the session is later recreated."""

    def after_create_session(self, session: TrainingSession) -> None:
        """The variables hold their values (initialised or restored); again after each recreation."""

    def before_run(self, context: RunContext) -> None:
        """Before each step. The step is still made when a stop is requested here."""

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """After each step, with what it gave."""

    def while_waiting(self, context: RunContext) -> None:
        """About every second while the chief, which has made its last step, waits for the other workers to finish.

        The session's ``global_step`` is fresh. Duties that a hook has for all workers, such as checkpoints, go on here.
        """

    def end(self, session: TrainingSession) -> None:
        """After a clean stop. Variables can still be read and saved."""


def as_tuple(items: Iterable[T] | None, kind: type[T], where: str) -> tuple[T, ...]:
    """``items`` as a tuple whose elements are all of ``kind``; None counts as empty.

    Raises:
        TypeError: If ``items`` is one object instead of several, or an element is of another type.
    """
    if items is None:
        return ()
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        raise TypeError(f"{where}: expected a sequence of {kind.__name__}, got {items!r}; put it into a list")
    found = tuple(items)
    for index, item in enumerate(found):
        if not isinstance(item, kind):
            raise TypeError(f"{where}[{index}]: expected an instance of {kind.__name__}, got {item!r}")
    return found


def order_hooks(
    *,
    is_chief: bool,
    chief_only: Sequence[TrainingHook] = (),
    user: Sequence[TrainingHook] = (),
    last: Sequence[TrainingHook] = (),
) -> tuple[TrainingHook, ...]:
    """The hooks of one task in the order in which they are called.

    Args:
        is_chief: Whether this task is the chief; others drop ``chief_only``.
        chief_only: Checkpoints, summaries, and what the user gave for the chief.
        user: What the user gave for every worker.
        last: What may end the run on what it sees (`NanLossHook`), and logging.
    """
    return (*(chief_only if is_chief else ()), *user, *last)


class HookRunner:
    """Calls hooks around the steps of one training, in the order of this module's rules.

    `run` is the whole loop; the other methods are its parts, for a loop that recreates its session.
    Not thread-safe.
    """

    def __init__(self, hooks: Sequence[TrainingHook]) -> None:
        self.hooks = tuple(hooks)
        self._context: RunContext | None = None

    def __repr__(self) -> str:
        names = ", ".join(type(hook).__name__ for hook in self.hooks)
        return f"HookRunner([{names}], stop_requested={self.stop_requested})"

    @property
    def stop_requested(self) -> bool:
        """Whether a hook of the current session has asked for its end."""
        return self._context is not None and self._context.stop_requested

    def begin(self) -> None:
        """Before the first session is created; once per training."""
        for hook in self.hooks:
            hook.begin()

    def after_create_session(self, session: TrainingSession) -> None:
        """A session is there, for the first time or after it was recreated."""
        self._context = RunContext(session)
        for hook in self.hooks:
            hook.after_create_session(session)

    def step(self, step: Callable[[], RunValues]) -> RunValues:
        """One step with the hooks around it.

        Raises:
            RuntimeError: If a stop was requested, or there is no session yet.
            Exception: Whatever ``step`` or a hook raises; StopIteration is how input ends.
        """
        context = self._context
        if context is None:
            raise RuntimeError("a step was asked for before its session was created")
        if context.stop_requested:
            raise RuntimeError(f"a step was asked for on {context.session.task} after a hook requested a stop")
        for hook in self.hooks:
            hook.before_run(context)
        values = context.make(step)
        for hook in self.hooks:
            hook.after_run(context, values)
        return values

    def while_waiting(self) -> None:
        """This task has made its last step, and waits for others.

        Raises:
            RuntimeError: If there is no session yet.
        """
        if self._context is None:
            raise RuntimeError("a wait was reported before its session was created")
        for hook in self.hooks:
            hook.while_waiting(self._context)

    def end(self, session: TrainingSession) -> None:
        """After a clean stop."""
        for hook in self.hooks:
            hook.end(session)

    def run(self, create_session: Callable[[], SessionT], step: Callable[[SessionT], RunValues]) -> SessionT:
        """Train until a hook requests a stop, the session should stop, or the input ends.

        Blocks for the whole training. Closing the session is the caller's part.

        Args:
            create_session: Makes the session, with the variables initialised or restored.
            step: Makes one step; raises StopIteration when the input is at its end.

        Returns:
            The session, after ``end`` of all hooks.

        Raises:
            Exception: Whatever ``create_session``, ``step`` or a hook raises, except a step's StopIteration.
        """
        self.begin()
        session = create_session()
        self.after_create_session(session)
        try:
            while not self.stop_requested and not session.should_stop():
                self.step(lambda: step(session))
        except StopIteration:
            pass  # the input's way of saying that it is at its end
        self.end(session)
        return session
