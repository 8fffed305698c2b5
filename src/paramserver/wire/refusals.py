"""The conversion of exceptions to refusals, which can be sent, and back."""

from __future__ import annotations

from typing import TypeVar

from paramserver.errors import (
    CheckpointError,
    ModelMismatchError,
    NotFiniteError,
    ParameterServerError,
    RefusedError,
    RemoteProtocolError,
    RunFailedError,
    RunOverError,
    TokenError,
    UnavailableError,
)
from paramserver.wire.messages import Message, Refused

M = TypeVar("M", bound=Message)


def refused(error: ParameterServerError) -> Refused:
    """Return the message for an exception."""
    match error:
        case ModelMismatchError():
            return Refused("model", str(error), error.variable)
        case NotFiniteError():
            return Refused("not finite", str(error), error.variable)
        case CheckpointError():
            return Refused("checkpoint", str(error), error.path)
        case TokenError():
            return Refused("token", str(error))
        case RunFailedError():
            return Refused("failed", str(error))
        case UnavailableError():
            return Refused("unavailable", str(error))
        case RunOverError():
            return Refused("over", str(error))
        case _:
            return Refused("refused", str(error))


def raised(refusal: Refused, task: str) -> ParameterServerError:
    """Return the exception for a message that ``task`` sent."""
    match refusal.kind:
        case "model":
            return ModelMismatchError(refusal.message, task, refusal.subject)
        case "not finite":
            return NotFiniteError(refusal.message, "", refusal.subject)
        case "checkpoint":
            return CheckpointError(refusal.message, refusal.subject)
        case "token":
            return TokenError(refusal.message, task)
        case "failed":
            return RunFailedError(refusal.message, task)
        case "unavailable":
            return UnavailableError(refusal.message, task)
        case "over":
            return RunOverError(refusal.message)
        case _:
            return RefusedError(refusal.message, task)


def expect(reply: Message, kind: type[M], task: str) -> M:
    """Return the reply of a task if it is of the kind that was asked for.

    Raises:
        ParameterServerError: If the task has refused: the exception for its refusal.
        RemoteProtocolError: If the reply is of another kind.
    """
    if isinstance(reply, kind):
        return reply
    if isinstance(reply, Refused):
        raise raised(reply, task)
    raise RemoteProtocolError(f"{task} was expected to answer {kind.__name__}, and answered {reply}")
