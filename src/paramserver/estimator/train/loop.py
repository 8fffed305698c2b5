"""The loop of a training on one task: steps until a hook or the session ends it, over the losses of ps tasks.

Rules
    * After each loss of a ps that the session recovers from, what was interrupted is done again, and the hooks are told
      of the recovered session before that.
    * The end counts only if no step was lost meanwhile; otherwise the task trains on while it has input.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from paramserver.cluster.exit_codes import is_request_to_leave
from paramserver.errors import UnavailableError
from paramserver.estimator.calling import Batch
from paramserver.estimator.hooks.hook import HookRunner
from paramserver.estimator.train.session import TrainingRun

logger = logging.getLogger(__name__)


class TrainingLoop:
    """Trains a session to its end.

    Args:
        session: The session, just created.
        runner: The hooks, which have begun.
    """

    def __init__(self, session: TrainingRun, runner: HookRunner) -> None:
        self._session = session
        self._runner = runner

    def run(self, read: Callable[[], Iterator[Batch]]) -> None:
        """Train on the input that ``read`` opens, and close the session. Blocks."""
        with self._saving_when_asked_to_leave():
            self._announce()
            batches = read()
            self._train_on(batches)
            while not self._finish():
                self._train_on(batches)
        self._session.close()

    @contextlib.contextmanager
    def _saving_when_asked_to_leave(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as error:
            if is_request_to_leave(error):
                self._runner.leave(self._session)
            raise

    def _train_on(self, batches: Iterator[Batch]) -> None:
        session, runner = self._session, self._runner
        with contextlib.suppress(StopIteration):  # the input has ended
            while not runner.stop_requested and not session.should_stop():
                self._persist(lambda: runner.step(lambda: session.step(batches)))

    def _finish(self) -> bool:
        """End the training; return False if a ps was lost meanwhile together with steps that were already made."""
        session, runner = self._session, self._runner
        reached = session.global_step
        self._persist(lambda: session.finish(runner.while_waiting))
        if session.global_step >= reached:
            self._persist(lambda: runner.end(session))
        if session.global_step < reached:
            logger.warning(
                "%s had finished at step %d, but lost updates put it back at step %d: it trains on while it has input",
                session.task,
                reached,
                session.global_step,
            )
        return session.global_step >= reached

    def _persist(self, action: Callable[[], object]) -> None:
        """Do something with the ps tasks, and repeat it after each loss that the session recovers from."""
        while (loss := _loss(action)) is not None:
            self._session.recover(loss)
            self._announce()

    def _announce(self) -> None:
        """Call the hooks for a session that is new or has recovered; again after each loss during these calls."""
        while (loss := _loss(lambda: self._runner.after_create_session(self._session))) is not None:
            self._session.recover(loss)


def _loss(action: Callable[[], object]) -> UnavailableError | None:
    """Do something; return the error if a ps was lost meanwhile."""
    try:
        action()
    except UnavailableError as error:
        return error
    return None
