"""How far the updates of one worker have come, so that each is made once and whole, however often it arrives.

Rules
    * Updates have ascending numbers, and consist of parts that are applied one after another.
    * A worker whose connection was lost in the middle of an update sends it once more by another connection, with the
      same number: it goes on with the first part that was not applied. Until the thread that serves the lost connection
      has let go of the update, the other one waits.
    * A part that has failed, or was interrupted in this process, may have been applied or not: its update is over, and
      whoever sends it again is told.
"""

from __future__ import annotations

import threading


class Progress:
    """The updates of one incarnation of a worker.

    Attributes:
        lock: Held by the thread that makes an update, from its first part to its last; all methods need it.
        done: Parts of the last update that are applied.
    """

    __slots__ = ("_is_applying", "_is_over", "_number", "done", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()  # an interrupt in this process may leave it held
        self.done = 0
        self._number = 0
        self._is_over = True
        self._is_applying = False

    def begin(self, number: int) -> bool:
        """Begin an update, or go on with it; False if it is over already.

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
        """A part begins to be applied."""
        self._is_applying = True

    def leave_part(self) -> None:
        """The part is applied."""
        self._is_applying = False
        self.done += 1

    def end(self) -> None:
        """The update is made, or has failed."""
        self._is_over, self._is_applying = True, False
