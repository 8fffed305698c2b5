"""How two tasks find each other, make sure of each other, and choose a lane.

Rules
    * Each side sends its preamble at once: magic and protocol version.
    * The ps challenges with a nonce; the worker proves that it holds the run's token by an HMAC over it, and so
      does the ps over the worker's nonce. The token itself never travels.
    * The challenge names a Unix socket of the ps in Linux's abstract namespace. A worker that can connect to it is
      on the same host and goes on there, with shared memory; one that cannot, or was told to, stays with TCP.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time
from dataclasses import dataclass

from paramserver.errors import DeadlineError, RemoteProtocolError, TokenError
from paramserver.errors import UnavailableError as Unavailable
from paramserver.transport import memory
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import Lane, Session
from paramserver.transport.shared_memory import SharedMemoryLane, SharedMemorySession
from paramserver.transport.tcp import TcpLane, TcpSession, expect_reply
from paramserver.wire import codec
from paramserver.wire.messages import Challenge, Hello, Refused, Welcome
from paramserver.wire.refusals import raised

HANDSHAKE_TIMEOUT = 30.0
RETRY_INTERVAL = 0.1
_NONCE_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a task is.

    Attributes:
        task: Such as ``worker:1``.
        token: The secret that all tasks of a run hold.
        incarnation: Which start of the task this is.
    """

    task: str
    token: str
    incarnation: str


def new_incarnation() -> str:
    """A name for one start of a task."""
    return secrets.token_hex(8)


# --- the worker's side -----------------------------------------------------------------------------------------


def connect(address: str, peer: str, me: Identity, *, lane: str, timeout: float) -> Lane:
    """Connect to the ps ``peer`` at ``address`` (``host:port``), trying again until it is up.

    Blocks for at most about ``timeout`` seconds.

    Raises:
        DeadlineError: If the ps does not come up in time.
        TokenError: If this task or the ps does not hold the token of the run.
        RemoteProtocolError: If something else answers, or another version.
        RunOverError: If the run has ended already.
    """
    give_up = time.monotonic() + timeout
    frames = FrameSocket(_dial(address, peer, give_up, timeout), peer)
    try:
        challenge = _meet(frames, peer, give_up, timeout)
        if lane == "auto" and challenge.local_socket and (local := _dial_local(challenge.local_socket)):
            frames.close()
            frames = FrameSocket(local, peer)
            challenge = _meet(frames, peer, give_up, timeout)
            return SharedMemoryLane(_introduce(frames, challenge, peer, me))
        return TcpLane(_introduce(frames, challenge, peer, me))
    except BaseException:
        frames.close()
        raise


def _dial(address: str, peer: str, give_up: float, timeout: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    pause = threading.Event()  # nothing can be waited on before the peer listens
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), max(give_up - time.monotonic(), 0.01))
        except OSError as error:
            if time.monotonic() + RETRY_INTERVAL > give_up:
                raise DeadlineError(
                    f"{peer} at {address} did not come up within {timeout:g} s ({error}); "
                    "is it started, and is the address in TF_CONFIG right?",
                    timeout,
                ) from error
            pause.wait(RETRY_INTERVAL)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return connection


def _dial_local(name: str) -> socket.socket | None:
    if not memory.can_share():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(f"\0{name}")
    except OSError:
        connection.close()
        return None
    return connection


def _meet(frames: FrameSocket, peer: str, give_up: float, timeout: float) -> Challenge:
    frames.set_timeout(max(give_up - time.monotonic(), 0.01))
    frames.send_raw(codec.preamble())
    try:
        codec.check_preamble(frames.receive_raw(codec.PREAMBLE_BYTES), peer)
        challenge = expect_reply(frames)
    except Unavailable as error:
        raise DeadlineError(f"{peer} accepted the connection and then said nothing for {timeout:g} s", timeout) from error
    if not isinstance(challenge, Challenge):
        raise RemoteProtocolError(f"{peer} was expected to start with a challenge, and sent {challenge}")
    return challenge


def _introduce(frames: FrameSocket, challenge: Challenge, peer: str, me: Identity) -> FrameSocket:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    frames.send(Hello(me.task, peer, me.incarnation, _proof(me.token, challenge.nonce, me.task), nonce))
    answer = expect_reply(frames)
    if isinstance(answer, Refused):
        raise raised(answer, peer)
    if not isinstance(answer, Welcome) or not hmac.compare_digest(answer.proof, _proof(me.token, nonce, peer)):
        raise TokenError(f"{peer} could not prove that it belongs to this run; is something else at its address?", peer)
    frames.set_timeout(0)
    return frames


# --- the ps's side ---------------------------------------------------------------------------------------------


def accept(connection: socket.socket, me: Identity, local_socket: str) -> Session:
    """Make sure of whoever connected. Blocks for at most `HANDSHAKE_TIMEOUT` for each message.

    Args:
        connection: A connection that was just accepted; closed if it comes to nothing.
        me: This ps.
        local_socket: The abstract name under which it also listens, "" if it does not.

    Raises:
        TokenError: If the peer does not hold the token.
        RemoteProtocolError: If it is no task, of another version, or looks for another ps.
        UnavailableError: If it goes away or says nothing.
    """
    is_local = connection.family == socket.AF_UNIX
    if not is_local:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    frames = FrameSocket(connection, "a peer that has not said who it is")
    try:
        hello = _examine(frames, me, local_socket)
    except BaseException:
        frames.close()
        raise
    frames.task = hello.task
    session = SharedMemorySession if is_local else TcpSession
    return session(frames, hello.incarnation)


def _examine(frames: FrameSocket, me: Identity, local_socket: str) -> Hello:
    frames.set_timeout(HANDSHAKE_TIMEOUT)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    frames.send_raw(codec.preamble())
    codec.check_preamble(frames.receive_raw(codec.PREAMBLE_BYTES), frames.task)
    frames.send(Challenge(me.task, nonce, local_socket))
    hello = frames.receive()
    if hello is None:
        raise Unavailable(f"{frames.task} went away after the challenge", frames.task)
    if not isinstance(hello, Hello):
        raise RemoteProtocolError(f"{frames.task} was challenged and answered {hello}")
    refused = _objection(hello, me, nonce)
    if refused:
        with contextlib.suppress(Unavailable):  # it may not wait for the answer
            frames.send(refused)
        raise TokenError(refused.message, hello.task)
    frames.send(Welcome(_proof(me.token, hello.nonce, me.task)))
    frames.set_timeout(0)
    return hello


def _objection(hello: Hello, me: Identity, nonce: bytes) -> Refused | None:
    if not hmac.compare_digest(hello.proof, _proof(me.token, nonce, hello.task)):
        return Refused(
            "token",
            f"{me.task} refused {hello.task}: it does not hold the token of this run; "
            "set PARAMSERVER_TOKEN to the same value for all tasks of a run",
        )
    if hello.peer != me.task:
        return Refused(
            "refused", f"{hello.task} looked for {hello.peer} and found {me.task}; is an address in TF_CONFIG wrong?"
        )
    return None


def _proof(token: str, nonce: bytes, task: str) -> bytes:
    return hmac.digest(token.encode(), nonce + task.encode(), "sha256")
