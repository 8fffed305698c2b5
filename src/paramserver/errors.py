"""The errors that paramserver raises on purpose: one tree, with fields to act on.

A message says what was tried, on which task or variable, what was expected, what was got and what to do. Errors about
arguments are also ``ValueError`` or ``TypeError``, errors about peers also ``ConnectionError`` or ``TimeoutError``, so
that code which does not know paramserver can catch them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParameterServerError(Exception):
    """The base of all errors. Catch it to catch every error that paramserver raises on purpose."""


class ConfigError(ParameterServerError, ValueError):
    """A value from the caller or the environment is invalid: a cluster, a field, an option.

    Raised before anything is started; nothing has to be cleaned up.
    """


class EditedError(ParameterServerError, RuntimeError):
    """The program has written values into a parameter whose values belong to the parameter servers.

    Attributes:
        variable: The parameter's name.
    """

    def __init__(self, message: str, variable: str) -> None:
        super().__init__(message)
        self.variable = variable


class UnsupportedOptimizerError(ConfigError):
    """An optimizer whose rule cannot run on a parameter server, because it is not elementwise.

    Attributes:
        optimizer: The class name of the optimizer that was refused.
    """

    def __init__(self, message: str, optimizer: str) -> None:
        super().__init__(message)
        self.optimizer = optimizer


class UnavailableError(ParameterServerError, ConnectionError):
    """A task cannot be reached, or the connection to it was lost.

    Attributes:
        task: The unreachable task, such as ``ps:1``.
    """

    def __init__(self, message: str, task: str) -> None:
        super().__init__(message)
        self.task = task


class AddressError(UnavailableError):
    """A ps cannot listen on its address, because another process does or the address is not of this machine."""


class DeadlineError(ParameterServerError, TimeoutError):
    """An awaited event did not happen in time.

    Attributes:
        timeout: Seconds that were waited.
    """

    def __init__(self, message: str, timeout: float) -> None:
        super().__init__(message)
        self.timeout = timeout


class LocalProtocolError(ParameterServerError):
    """This process broke the protocol: it sent a message at the wrong time, or one that is too large."""


class RemoteProtocolError(ParameterServerError):
    """The peer broke the protocol: it is not a paramserver task, has another version, or sent nonsense."""


class RefusedError(ParameterServerError):
    """A task understood a request and refused it. The message comes from the refusing task.

    Attributes:
        task: The task that refused.
    """

    def __init__(self, message: str, task: str) -> None:
        super().__init__(message)
        self.task = task


class TokenError(RefusedError):
    """The peer does not hold the token of this run: it belongs to another run, or to none."""


class RunFailedError(RefusedError):
    """The chief has failed, and the run with it. The message is the chief's; the task that reads it is not to blame."""


class ModelMismatchError(RefusedError):
    """The model that a worker declares differs from the one that the chief created.

    Attributes:
        variable: The first variable that differs; ``""`` if the difference is not about one variable.
    """

    def __init__(self, message: str, task: str, variable: str = "") -> None:
        super().__init__(message, task)
        self.variable = variable


class CheckpointError(ParameterServerError):
    """A checkpoint that cannot be written, is cut short, or belongs to another model.

    Attributes:
        path: The file or directory of the error.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class NotFiniteError(CheckpointError):
    """A trained variable holds NaN or infinity and is not checkpointed, because no restart would recover from that.

    Attributes:
        variable: The first such variable; ``path`` is the checkpoint that was not written, if it is known.
    """

    def __init__(self, message: str, path: str, variable: str) -> None:
        super().__init__(message, path)
        self.variable = variable


class RunOverError(ParameterServerError):
    """The run that a task wanted to join is over already. Not a fault: the task can exit with code 0."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest one of ``names``, if one is near.

    >>> did_you_mean("wroker", ["worker", "ps"])
    "; did you mean 'worker'?"
    >>> did_you_mean("zebra", ["worker", "ps"])
    ''
    """
    by_lower = {known.lower(): known for known in names}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
