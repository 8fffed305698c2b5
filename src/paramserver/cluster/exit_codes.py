"""The exit codes of tasks, as shells and schedulers read them."""

from __future__ import annotations

import signal

from paramserver.errors import AddressError, DeadlineError, RunFailedError, UnavailableError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
"""Codes of a task that was asked to leave before its work was done; it may be started again."""

FAILED = 1
"""Code of a task that failed of its own."""

CONSEQUENCE = 75
"""Code of a task that ended because another one failed or could not be reached: EX_TEMPFAIL of ``sysexits.h``."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error that ends a task.

    >>> exit_code(UnavailableError("ps:0 was lost", "ps:0")), exit_code(ValueError("no data"))
    (75, 1)
    """
    of_others = isinstance(error, (UnavailableError, DeadlineError, RunFailedError))
    of_others &= not isinstance(error, AddressError)
    return CONSEQUENCE if of_others else FAILED


def is_request_to_leave(error: BaseException | None) -> bool:
    """Return whether an exception ends a program because it was asked to leave, not because it failed or finished.

    >>> [is_request_to_leave(error) for error in (KeyboardInterrupt(), SystemExit(143), SystemExit(1))]
    [True, True, False]
    """
    if isinstance(error, SystemExit):
        return error.code in (INTERRUPTED, TERMINATED)
    return isinstance(error, KeyboardInterrupt)


def may_come_back(error: BaseException | None) -> bool:
    """Return whether a task that an exception ends has neither finished nor failed, so that it may be started again.

    It was asked to leave, or it has lost a ps.

    >>> [may_come_back(error) for error in (SystemExit(143), UnavailableError("ps:0 was lost", "ps:0"), ValueError())]
    [True, True, False]
    """
    has_lost_another = isinstance(error, UnavailableError) and not isinstance(error, AddressError)
    return has_lost_another or is_request_to_leave(error)
