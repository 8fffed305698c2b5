"""The progress of one worker's updates, so that each is applied exactly once and whole, however often it arrives.

Rules
    * Updates have ascending numbers, and consist of parts that are applied one after another.
    * A worker whose connection was lost in the middle of an update sends the update again on another connection, with
      the same number. It continues with the first part that was not applied. The second connection waits until the
      thread that serves the lost one has let go of the update.
    * A part that has failed, or was interrupted in this process, may or may not have been applied: its update is over,
      and a task that sends the update again gets an error.
"""

from __future__ import annotations

import threading


class Progress:
    """The updates of one incarnation of a worker.

    Attributes:
        lock: Held by the thread that applies an update, from its first part to its last; all methods need it.
        done: Number of parts of the last update that are applied.
    """

    __slots__ = ("_is_applying", "_is_over", "_number", "done", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant, because an interrupt in this process may leave it held
        self.done = 0
        self._number = 0
        self._is_over = True
        self._is_applying = False

    def begin(self, number: int) -> bool:
        """Begin an update, or go on with it; return False if it is over already.

        Raises:
            ValueError: If one of its parts has failed.
        """
        if number > self._number:
            self.done, self._is_over, self._is_applying = 0, False, False
            self._number = number
            return True
        if self._is_applying:
            self._is_applying, self._is_over = False, True
            raise ValueError(f"it was interrupted in the middle of part {self.done + 1}, which may be applied in part")
        return number == self._number and not self._is_over

    def enter_part(self) -> None:
        """Note that a part begins to be applied."""
        self._is_applying = True

    def leave_part(self, count: int = 1) -> None:
        """Note that the part, or ``count`` parts at once, are applied."""
        self._is_applying = False
        self.done += count

    def end(self) -> None:
        """Note that the update is complete, or has failed."""
        self._is_over, self._is_applying = True, False
