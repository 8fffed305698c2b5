"""Every error that paramserver raises on purpose: one tree, with fields to act on.

A message says what was tried, on which task or variable, what was expected, what was got and what to do.
Errors about arguments are ``ValueError`` or ``TypeError`` as well, errors about peers ``ConnectionError`` or
``TimeoutError``, so that code which knows nothing of paramserver can still catch them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParameterServerError(Exception):
    """The root of the tree. Catch it to catch whatever paramserver raises on purpose."""


class ConfigError(ParameterServerError, ValueError):
    """What the caller or the environment passed in cannot work (a cluster, a field, an option).

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
        task: The task that was being talked to, such as ``ps:1``.
    """

    def __init__(self, message: str, task: str) -> None:
        super().__init__(message)
        self.task = task


class DeadlineError(ParameterServerError, TimeoutError):
    """Something that was waited for did not happen in time.

    Attributes:
        timeout: How long was waited, in seconds.
    """

    def __init__(self, message: str, timeout: float) -> None:
        super().__init__(message)
        self.timeout = timeout


class LocalProtocolError(ParameterServerError):
    """This process broke the protocol: a message that may not be sent now, or is too large to be sent."""


class RemoteProtocolError(ParameterServerError):
    """The peer broke the protocol: it is no paramserver task, has another version, or sent nonsense."""


class RefusedError(ParameterServerError):
    """A task understood a request and refused it. The message is the refusing task's own.

    Attributes:
        task: The task that refused.
    """

    def __init__(self, message: str, task: str) -> None:
        super().__init__(message)
        self.task = task


class TokenError(RefusedError):
    """The peer does not hold this run's token: it belongs to another run, or to nobody."""


class ModelMismatchError(RefusedError):
    """The model that a worker declares differs from the one that the chief created.

    Attributes:
        variable: The first variable that differs, ``""`` where it is not about one variable.
    """

    def __init__(self, message: str, task: str, variable: str = "") -> None:
        super().__init__(message, task)
        self.variable = variable


class CheckpointError(ParameterServerError):
    """A checkpoint that cannot be written, is cut short, or belongs to another model.

    Attributes:
        path: The file or directory it is about.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class NotFiniteError(CheckpointError):
    """A trained variable holds NaN or infinity, and is not checkpointed: no restart would get out of it.

    Attributes:
        variable: The first one that was found; ``path`` is the checkpoint that was not written, where it is known.
    """

    def __init__(self, message: str, path: str, variable: str) -> None:
        super().__init__(message, path)
        self.variable = variable


class RunOverError(ParameterServerError):
    """The run that a task wanted to join has ended already. Not a fault: the task can leave with code 0."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about a name that is not known: the nearest one of ``names``, if any is near.

    >>> did_you_mean("wroker", ["worker", "ps"])
    "; did you mean 'worker'?"
    >>> did_you_mean("zebra", ["worker", "ps"])
    ''
    """
    by_lower = {known.lower(): known for known in names}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
