"""The ps's side of the handshake: bytes in, bytes out. No socket, no clock, no thread.

Rules
    * The ps begins with its preamble and a challenge. A stranger answers with its preamble and a `Hello`, and with
      nothing else before it has been welcomed.
    * Exactly the bytes of these are asked for: the first byte after the `Hello` is left to the lane, whose session may
      expect a descriptor beside it.
    * What a stranger sends is neither believed nor repeated in messages before its proof was checked.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Generator
from typing import NamedTuple

from paramserver.errors import ConfigError, RemoteProtocolError
from paramserver.transport.identity import NONCE_BYTES, STRANGER, Identity
from paramserver.transport.lanes import lane_kind
from paramserver.wire import codec
from paramserver.wire.messages import Challenge, Hello, Refused, Welcome
from paramserver.wire.refusals import raised


class Turn(NamedTuple):
    """A step of the handshake: bytes to send, and then the number of bytes to receive."""

    send: bytes
    receive: int = 0


Admission = Generator[Turn, bytes, Hello]
"""Generator that yields each turn, is sent the bytes received, and returns the `Hello` of a peer that is admitted."""


def admit(me: Identity, local_socket: str, *, is_local: bool) -> Admission:
    """Return the handshake with a peer that has just connected.

    Args:
        me: The identity of this ps.
        local_socket: The abstract name under which the ps also listens; "" if it does not.
        is_local: Whether the peer has connected there.

    Raises:
        TokenError: If the peer does not hold the token.
        RefusedError: If the peer looks for another ps, or its lane cannot be served.
        RemoteProtocolError: If the peer is not a task of the same version.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    challenge = Challenge(me.task, nonce, local_socket)
    codec.check_preamble((yield Turn(codec.preamble() + codec.encode(challenge), codec.PREAMBLE_BYTES)), STRANGER)
    head = yield Turn(b"", codec.HEADER_BYTES)
    message_bytes, payload_bytes = codec.decode_header(head, STRANGER, codec.MAX_HANDSHAKE_BYTES)
    if payload_bytes:
        raise RemoteProtocolError(f"{STRANGER} announced a payload of {payload_bytes} bytes before it was welcomed")
    hello = codec.decode((yield Turn(b"", message_bytes)), STRANGER)
    if not isinstance(hello, Hello):
        raise RemoteProtocolError(f"{STRANGER} was challenged and answered {type(hello).__name__}")
    if refused := _objection(hello, me, nonce, is_local=is_local):
        yield Turn(codec.encode(refused))
        raise raised(refused, me.task)
    yield Turn(codec.encode(Welcome(me.proof(hello.nonce))))
    return hello


def _objection(hello: Hello, me: Identity, nonce: bytes, *, is_local: bool) -> Refused | None:
    if not hmac.compare_digest(hello.proof, me.proof(nonce, hello.task)):
        return Refused(
            "token",
            f"{me.task} refused {hello.task}: it does not hold the token of this run; "
            "set PARAMSERVER_TOKEN to the same value for all tasks of a run",
        )
    if hello.peer != me.task:
        return Refused(
            "refused", f"{hello.task} looked for {hello.peer} and found {me.task}; is an address in TF_CONFIG wrong?"
        )
    try:
        kind = lane_kind(hello.lane)
    except ConfigError as error:
        return Refused(
            "refused", f"{me.task} cannot serve {hello.task}: {error}; install the package that brings it on the ps"
        )
    if kind.is_local and not is_local:
        return Refused(
            "refused", f"{hello.task} asked for a {hello.lane} lane from another host than that of {me.task}"
        )
    return None
