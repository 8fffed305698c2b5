"""Hooks: a user's own code at fixed moments of a training session, and the order of the calls.

Rules
    * ``begin`` of all hooks -> the session is created -> ``after_create_session`` of all -> [``before_run`` of
      all -> one step -> ``after_run`` of all] repeated -> ``end`` of all.
    * While the chief, whose own input has ended, waits for the other workers, ``while_waiting`` of all hooks is called
      about once a second, so that work for all workers, such as checkpoints, continues.
    * ``end`` is called after a clean stop only: a hook has asked for it, the session ends by itself, or the input has
      ended (StopIteration). After any other exception it is not called, because the data that a hook writes at the end
      would look like a result.
    * A task that is asked to leave, by SIGTERM or Ctrl-C, calls ``leave`` of all hooks instead.
    * All hooks see every complete step: a stop that one hook asks for takes effect after all have seen the step.
    * No step is made after a stop was asked for.
    * The context managers around a step (`RunContext.wrap_step`) are entered after all ``before_run``, in the order of
      the hooks, and left before the first ``after_run``, also when the step fails.
    * The chief's own hooks come before the user's, and the user's before those that may end the run on a bad loss.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from paramserver.distribute.bound.step_times import StepTimes
from paramserver.errors import ParameterServerError

logger = logging.getLogger(__name__)


class TrainingSession(Protocol):
    """The part of the running training that hooks may use."""

    @property
    def global_step(self) -> int:
        """The last known number of updates of the model, including those of other workers. Does not block."""

    @property
    def is_chief(self) -> bool:
        """Whether this task checkpoints and writes summaries."""

    @property
    def task(self) -> str:
        """The name of this task, such as ``worker:1``."""

    @property
    def model_dir(self) -> str:
        """The folder of checkpoints and summaries."""

    def read_global_step(self) -> int:
        """Request the present number of updates of the model. Blocks for a round trip.

        Raises:
            UnavailableError: If the ps task cannot be reached.
        """

    def refresh(self) -> int:
        """Read the model's values from the ps tasks, as every step does; return the global step. Blocks.

        Raises:
            UnavailableError: If a ps task cannot be reached.
        """

    def values(self) -> dict[str, torch.Tensor]:
        """Return the values of the model by name, as in checkpoints. Blocks if the model has tables."""

    def save(self) -> str:
        """Write a checkpoint and return its path. Blocks until it is complete.

        Raises:
            CheckpointError: If the checkpoint cannot be written.
            UnavailableError: If a ps task cannot be reached.
        """

    def statistics(self) -> StepTimes:
        """Return where the time of this task's steps has gone. Does not block."""

    def should_stop(self) -> bool:
        """Return whether the session ends by itself, because the run is over or `max_steps` is reached."""


SessionT = TypeVar("SessionT", bound=TrainingSession)
T = TypeVar("T")


class RunValues(NamedTuple):
    """The result of one step. A named tuple, which is cheap, because one is made every step."""

    loss: torch.Tensor | float
    """The loss of this worker's batch, one element. Read it with ``float()``, which waits for the device."""
    global_step: int
    """The global step when this step's update was applied."""
    staleness: int
    """Number of updates of other workers between this step's pull and its push."""


class RunContext:
    """The state that the hooks of one session share: the session, and the request to stop."""

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
        """Enter a context manager around the next step, and only that step. For use in ``before_run``.

        It serves hooks that need more of a step than its values, such as a profile.
        """
        self._wraps.append(manager)

    def make(self, step: Callable[[], RunValues]) -> RunValues:
        """Make a step inside the context managers of `wrap_step`."""
        if not self._wraps:
            return step()
        wraps, self._wraps = self._wraps, []
        with contextlib.ExitStack() as stack:
            for manager in wraps:
                stack.enter_context(manager)
            return step()


class TrainingHook:
    """Code that is called at fixed moments of a session. Override the methods you need; the others do nothing.

    All methods are called on the thread that trains. One object serves one session at a time. An exception in any
    method ends the training; then ``end`` of the other hooks is not called.
    """

    def begin(self) -> None:
        """Called once before the session is created, and not again when the session is recreated."""

    def after_create_session(self, session: TrainingSession) -> None:
        """Called when the variables are initialized or restored; again after each recreation of the session."""

    def before_run(self, context: RunContext) -> None:
        """Called before each step. The step is still made if a stop is requested here."""

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Called after each step, with its values."""

    def while_waiting(self, context: RunContext) -> None:
        """Called about once a second while the chief, after its last step, waits for the other workers to finish.

        The session's ``global_step`` is fresh. A hook's work for all workers, such as checkpoints, continues here.
        """

    def end(self, session: TrainingSession) -> None:
        """Called after a clean stop. Variables can still be read and saved."""

    def leave(self, session: TrainingSession) -> None:
        """Called instead of ``end`` when the task is asked to leave, by SIGTERM or Ctrl-C: the place to save.

        The step at hand may be incomplete. The process may be killed after its grace time, often 30 seconds.
        """


def as_tuple(items: Iterable[T] | None, kind: type[T], where: str) -> tuple[T, ...]:
    """Return ``items`` as a tuple of objects of one type; None counts as empty.

    Raises:
        TypeError: If ``items`` is a single object, or an element is of another type.
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
    """Return the hooks of one task in the order in which they are called.

    Args:
        is_chief: Whether this task is the chief; other tasks drop ``chief_only``.
        chief_only: The hooks for checkpoints and summaries, and the user's for the chief.
        user: The user's hooks for every worker.
        last: The hooks that may end the run on the values they see (`NanLossHook`), and logging.
    """
    return (*(chief_only if is_chief else ()), *user, *last)


class HookRunner:
    """Calls hooks around the steps of one training, in the order of this module's rules.

    `run` is the whole loop; the other methods are its parts, for a loop that recreates its session. Not thread-safe.
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
        """Call ``begin`` of all hooks, before the first session is created; once per training."""
        for hook in self.hooks:
            hook.begin()

    def after_create_session(self, session: TrainingSession) -> None:
        """Call ``after_create_session`` of all hooks, for a session that is new or was recreated."""
        self._context = RunContext(session)
        for hook in self.hooks:
            hook.after_create_session(session)

    def step(self, step: Callable[[], RunValues]) -> RunValues:
        """Make one step with the hooks around it.

        Raises:
            RuntimeError: If a stop was requested, or there is no session yet.
            Exception: Any exception of ``step`` or a hook; StopIteration means the end of the input.
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
        """Call ``while_waiting`` of all hooks: this task has made its last step, and waits for others.

        Raises:
            RuntimeError: If there is no session yet.
        """
        if self._context is None:
            raise RuntimeError("a wait was reported before its session was created")
        for hook in self.hooks:
            hook.while_waiting(self._context)

    def end(self, session: TrainingSession) -> None:
        """Call ``end`` of all hooks, after a clean stop."""
        for hook in self.hooks:
            hook.end(session)

    def leave(self, session: TrainingSession) -> None:
        """Call ``leave`` of all hooks, for a task that is asked to leave. Failures are logged: others still train."""
        for hook in self.hooks:
            try:
                hook.leave(session)
            except ParameterServerError as error:
                # As text: a traceback would keep the session.
                logger.error("%s leaves, and %s failed: %s", session.task, type(hook).__name__, str(error))

    def run(self, create_session: Callable[[], SessionT], step: Callable[[SessionT], RunValues]) -> SessionT:
        """Train until a hook requests a stop, the session should stop, or the input ends.

        Blocks for the whole training. The caller closes the session.

        Args:
            create_session: Makes the session, with the variables initialized or restored.
            step: Makes one step; raises StopIteration at the end of the input.

        Returns:
            The session, after ``end`` of all hooks.

        Raises:
            Exception: Any exception of ``create_session``, ``step`` or a hook, except a step's StopIteration.
        """
        self.begin()
        session = create_session()
        self.after_create_session(session)
        try:
            while not self.stop_requested and not session.should_stop():
                self.step(lambda: step(session))
        except StopIteration:
            pass  # the input has ended
        self.end(session)
        return session
