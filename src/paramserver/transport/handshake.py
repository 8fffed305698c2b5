"""The handshake of two tasks: they find each other, verify each other, and choose a lane.

Rules
    * Each side sends its preamble at once: magic and protocol version.
    * The ps challenges with a nonce; the worker proves that it holds the run's token by an HMAC over this nonce, and
      the ps does the same over the worker's nonce. The token itself never travels.
    * The challenge names a Unix socket of the ps in Linux's abstract namespace. A worker that can connect to this
      socket is on the same host, and goes on there with a local lane if it may choose one. The worker names the lane
      that it has chosen, and both ends look it up by this name.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time

from paramserver.errors import ConfigError, DeadlineError, RefusedError, RemoteProtocolError, RunOverError, TokenError
from paramserver.errors import UnavailableError as Unavailable
from paramserver.layout.lanes import check_platform
from paramserver.memory import shared_file
from paramserver.transport.frames import FrameSocket
from paramserver.transport.identity import Identity
from paramserver.transport.lane import Lane, Session, WorkerMemory
from paramserver.transport.lanes import lane_kind, usable_lanes
from paramserver.transport.tcp import expect_reply
from paramserver.wire import codec
from paramserver.wire.messages import Challenge, Hello, Refused, Welcome
from paramserver.wire.refusals import raised

HANDSHAKE_TIMEOUT = 30.0
"""Seconds that a ps waits for each message of a peer during the handshake."""
REQUEST_TIMEOUT = 600.0
"""Seconds after which a ps that does not answer counts as lost. The longest requests write or read a shard."""
RETRY_INTERVAL = 0.1
SHORTEST_WAIT = 0.01
_NONCE_BYTES = 16


# --- the worker's side -----------------------------------------------------------------------------------------


def connect(
    address: str,
    peer: str | None,
    me: Identity,
    *,
    lane: str,
    timeout: float,
    listens: bool = False,
    kept: WorkerMemory | None = None,
) -> Lane:
    """Connect to the ps ``peer`` at ``address``, trying again until it is up. Blocks for about ``timeout`` at most.

    Args:
        address: The address of the ps, ``host:port``.
        peer: The expected ps; None accepts any ps.
        me: The identity of this task.
        lane: The name of a lane, or ``auto``.
        timeout: Seconds to try.
        listens: Whether the ps is known to have listened already: if it refuses the connection, it has ended, and the
            run with it.
        kept: The memory of an earlier lane, which the new lane will go on with.

    Raises:
        ConfigError: If there is no such lane, or this system has no lanes.
        RunOverError: If a ps that ``listens`` has ended.
        DeadlineError: If the ps does not come up in time.
        TokenError: If this task or the ps does not hold the token of the run.
        RefusedError: If another ps is at the address, or the lane does not lead to the ps.
        RemoteProtocolError: If something other than a ps answers, or a ps of another version.
        UnavailableError: If the ps goes away after its challenge.
    """
    check_platform(f"connecting to {peer or 'a ps'}")
    kinds = usable_lanes(lane, kept)
    frames, challenge = _reach(address, peer or "the ps", timeout, listens=listens)
    if peer is None:
        frames.task = peer = challenge.task
    try:
        for name, kind in kinds.items():
            if not kind.is_local:
                return kind.lane(_introduce(frames, challenge, me, name))
            if local := _dial_local(challenge.local_socket, peer):
                frames.close()
                frames = local
                return kind.lane(_introduce(frames, _meet(frames, timeout), me, name))
        raise RefusedError(f"a {lane} lane does not lead from {me.task} to {peer}, which is on another host", me.task)
    except BaseException:
        frames.close()
        raise


def _reach(address: str, peer: str, timeout: float, *, listens: bool) -> tuple[FrameSocket, Challenge]:
    """Return a connection to the ps and its challenge, as soon as the ps is up.

    A connection that is closed before the challenge is tried again: a proxy may accept before its ps is up.
    """
    give_up = time.monotonic() + timeout
    pause = threading.Event()  # only a pause: there is nothing to wait on before the peer listens
    while True:
        try:
            return _try_to_reach(address, peer, give_up)
        except OSError as error:  # an UnavailableError is one
            if listens and isinstance(error, ConnectionRefusedError):
                raise RunOverError(f"{peer} at {address} has left: the run is over") from error
            if time.monotonic() + RETRY_INTERVAL > give_up:
                raise DeadlineError(
                    f"{peer} at {address} did not come up within {timeout:g} s ({error}); "
                    "is it started, and is the address in TF_CONFIG right?",
                    timeout,
                ) from error
        pause.wait(RETRY_INTERVAL)


def _try_to_reach(address: str, peer: str, give_up: float) -> tuple[FrameSocket, Challenge]:
    host, _, port = address.rpartition(":")
    frames = FrameSocket(socket.create_connection((host.strip("[]"), int(port)), _remaining(give_up)), peer)
    try:
        return frames, _meet(frames, _remaining(give_up))
    except BaseException:
        frames.close()
        raise


def _remaining(give_up: float) -> float:
    return max(give_up - time.monotonic(), SHORTEST_WAIT)


def _dial_local(name: str, peer: str) -> FrameSocket | None:
    if not name or not shared_file.can_share():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(HANDSHAKE_TIMEOUT)
    try:
        connection.connect(f"\0{name}")
    except OSError:
        connection.close()
        return None
    return FrameSocket(connection, peer)


def _meet(frames: FrameSocket, timeout: float) -> Challenge:
    frames.set_timeout(max(timeout, SHORTEST_WAIT))
    frames.max_message_bytes = codec.MAX_HANDSHAKE_BYTES
    frames.send_raw(codec.preamble())
    codec.check_preamble(frames.receive_raw(codec.PREAMBLE_BYTES), frames.task)
    challenge = expect_reply(frames)
    if not isinstance(challenge, Challenge):
        raise RemoteProtocolError(f"{frames.task} was expected to start with a challenge, and sent {challenge}")
    return challenge


def _introduce(frames: FrameSocket, challenge: Challenge, me: Identity, lane: str) -> FrameSocket:
    peer = frames.task
    nonce = secrets.token_bytes(_NONCE_BYTES)
    frames.send(Hello(me.task, peer, me.incarnation, _proof(me.token, challenge.nonce, me.task), nonce, lane))
    answer = expect_reply(frames)
    if isinstance(answer, Refused):
        raise raised(answer, peer)
    if not isinstance(answer, Welcome) or not hmac.compare_digest(answer.proof, _proof(me.token, nonce, peer)):
        raise TokenError(f"{peer} could not prove that it belongs to this run; is something else at its address?", peer)
    frames.max_message_bytes = codec.MAX_MESSAGE_BYTES
    frames.set_timeout(REQUEST_TIMEOUT)
    return frames


# --- the ps's side ---------------------------------------------------------------------------------------------


def accept(frames: FrameSocket, me: Identity, local_socket: str) -> Session:
    """Verify a peer that has just connected. Blocks for at most `HANDSHAKE_TIMEOUT` for each message.

    Args:
        frames: The connection to a `STRANGER`, just accepted; closed if the handshake fails.
        me: The identity of this ps.
        local_socket: The abstract name under which the ps also listens; "" if it does not.

    Raises:
        TokenError: If the peer does not hold the token.
        RefusedError: If the peer looks for another ps, or its lane cannot be served.
        RemoteProtocolError: If the peer is not a task of the same version.
        UnavailableError: If the peer goes away or says nothing.
    """
    try:
        hello = _examine(frames, me, local_socket)
    except BaseException:
        frames.close()
        raise
    frames.task = hello.task
    return lane_kind(hello.lane).session(frames, hello.incarnation)


def _examine(frames: FrameSocket, me: Identity, local_socket: str) -> Hello:
    frames.set_timeout(HANDSHAKE_TIMEOUT)
    frames.max_message_bytes = codec.MAX_HANDSHAKE_BYTES
    nonce = secrets.token_bytes(_NONCE_BYTES)
    frames.send_raw(codec.preamble())
    codec.check_preamble(frames.receive_raw(codec.PREAMBLE_BYTES), frames.task)
    frames.send(Challenge(me.task, nonce, local_socket))
    hello = frames.receive()
    if hello is None:
        raise Unavailable(f"{frames.task} went away after the challenge", frames.task)
    if not isinstance(hello, Hello):
        raise RemoteProtocolError(f"{frames.task} was challenged and answered {hello}")
    refused = _objection(hello, me, nonce, is_local=frames.is_local)
    if refused:
        with contextlib.suppress(Unavailable):  # the peer may not wait for the answer
            frames.send(refused)
        raise raised(refused, me.task)
    frames.send(Welcome(_proof(me.token, hello.nonce, me.task)))
    frames.max_message_bytes = codec.MAX_MESSAGE_BYTES
    frames.set_timeout(0)  # a worker may compute for any time between two requests
    return hello


def _objection(hello: Hello, me: Identity, nonce: bytes, *, is_local: bool) -> Refused | None:
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


def _proof(token: str, nonce: bytes, task: str) -> bytes:
    return hmac.digest(token.encode(), nonce + task.encode(), "sha256")
